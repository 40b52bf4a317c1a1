// What the browser tests share: the stage that scripts/test_odoo has set, SQL on it, waiting, pictures, logging in.

import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { chromium } from 'playwright-core';

export const PATIENCE = 60_000;
const { IMBUS_FRONT, PSQL, SCREENSHOTS } = process.env;
export const A = `http://a.localhost:${IMBUS_FRONT}`;
export const B = `http://b.localhost:${IMBUS_FRONT}`;

/** How psql is called. */
export const psql = (database, ...more) => {
  const [command, ...args] = PSQL.split(' ');
  return [command, [...args, '-d', database, ...more]];
};

/** A psql query's text. */
export function sql(query, database = 'postgres') {
  return execFileSync(...psql(database, '-c', query), { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] }).trim();
}

/** A query that goes on beside; resolves when it has ended. */
export function sqlBeside(query, database) {
  const process = spawn(...psql(database, '-c', query), { stdio: 'ignore' });
  return new Promise((done) => process.on('close', done));
}

/** Waits until a function says something true; tells what was seen when it does not. */
export async function until(what, condition) {
  const end = Date.now() + PATIENCE;
  for (;;) {
    let seen;
    try {
      seen = await condition();
      if (seen) return seen;
    } catch (error) {
      seen = error;
    }
    if (Date.now() > end) assert.fail(`waited in vain until ${what}: ${seen}`);
    await new Promise((done) => setTimeout(done, 200));
  }
}

export async function picture(page, name) {
  if (!SCREENSHOTS) return;
  mkdirSync(SCREENSHOTS, { recursive: true });
  await page.screenshot({ path: join(SCREENSHOTS, `${name}.png`) });
}

export const launch = () =>
  chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'],
  });

/** A browser of its own in which somebody has logged in. */
export async function login(browser, site, name, password) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, acceptDownloads: true });
  const page = await context.newPage();
  await page.goto(`${site}/web/login`);
  await page.fill('input[name=login]', name);
  await page.fill('input[name=password]', password);
  await page.click('.oe_login_form button[type=submit]');
  await page.waitForSelector('.o_main_navbar', { timeout: PATIENCE });
  return { context, page, site };
}
