// The add-on in odoo/imbus, in a real browser: jobs from the page's point of view. Set up and run as test.mjs is.

import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { chromium } from 'playwright-core';

const PATIENCE = 60_000;
const { IMBUS_FRONT, PSQL, SCREENSHOTS } = process.env;
const A = `http://a.localhost:${IMBUS_FRONT}`;
const B = `http://b.localhost:${IMBUS_FRONT}`;

let browser, admin, second;

function sql(query, database = 'odoo_a') {
  const [command, ...args] = PSQL.split(' ');
  return execFileSync(command, [...args, '-d', database, '-c', query], { encoding: 'utf8' }).trim();
}

async function until(what, condition) {
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

async function picture(page, name) {
  if (!SCREENSHOTS) return;
  mkdirSync(SCREENSHOTS, { recursive: true });
  await page.screenshot({ path: join(SCREENSHOTS, `${name}.png`) });
}

async function login(site) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, acceptDownloads: true });
  const page = await context.newPage();
  await page.goto(`${site}/web/login`);
  await page.fill('input[name=login]', 'admin');
  await page.fill('input[name=password]', 'admin');
  await page.click('.oe_login_form button[type=submit]');
  await page.waitForSelector('.o_main_navbar', { timeout: PATIENCE });
  return page;
}

/** The page's own asyncRpc: {result} or {error}. */
const asyncRpc = (page, call) =>
  page.evaluate(async (call) => {
    try {
      return { result: await odoo.__WOWL_DEBUG__.root.env.services.async_job.asyncRpc(call) };
    } catch (error) {
      return { error: { name: error.name, exceptionName: error.exceptionName, message: error.data?.message } };
    }
  }, call);

before(async () => {
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'],
  });
  admin = await login(A);
  second = await admin.context().newPage();
  for (const page of [admin, second]) {
    await page.goto(`${A}/odoo/action-base.action_partner_form?view_type=list`);
    await page.waitForSelector('.o_main_navbar', { timeout: PATIENCE });
  }
});
after(() => browser?.close());

test('asyncRpc resolves with the result of the job, which is done then', async () => {
  const { result } = await asyncRpc(admin, { model: 'res.partner', method: 'search_count', args: [[['id', '=', 3]]] });
  assert.equal(result, 1);
  await until('the job is done', () => sql("SELECT state FROM ir_async WHERE method = 'search_count' ORDER BY id DESC LIMIT 1") === 'done');
});

test('asyncRpc rejects as an RPC does', async () => {
  const { error } = await asyncRpc(admin, { model: 'res.partner', method: 'write', args: [[999999999], { name: 'x' }] });
  assert.deepEqual([error.name, error.exceptionName], ['RPC_ERROR', 'odoo.exceptions.MissingError']);
  const { error: refused } = await asyncRpc(admin, { model: 'res.partner', method: '_write', args: [[3], {}] });
  assert.equal(refused.exceptionName, 'odoo.exceptions.AccessError');
});

test('a job that ends before its enqueueing is answered is not missed, nor are many at once', async () => {
  const results = await admin.evaluate(async () => {
    const { asyncRpc } = odoo.__WOWL_DEBUG__.root.env.services.async_job;
    const call = (id) => asyncRpc({ model: 'res.partner', method: 'search_count', args: [[['id', '=', id]]] });
    return Promise.all(Array.from({ length: 20 }, (_, index) => call(index % 2 ? 3 : 999999999)));
  });
  assert.deepEqual(results, Array.from({ length: 20 }, (_, index) => index % 2));
});

test('an export goes from the button to the file, and is gone from all tabs', async () => {
  await admin.waitForSelector('.o_list_view .o_data_row', { timeout: PATIENCE });
  await admin.click('.o_list_view thead .o_list_record_selector input');
  await admin.click('.o_cp_action_menus .dropdown-toggle');
  await admin.click('.o-dropdown--menu .o-dropdown-item:has-text("Export")');
  await admin.waitForSelector('.o_export_data_dialog .o_export_field', { timeout: PATIENCE });
  await picture(admin, 'odoo-async-export');
  await admin.click('.o_async_export');
  // The page is free at once.
  await admin.waitForSelector('.o_export_data_dialog', { state: 'detached', timeout: PATIENCE });
  for (const page of [admin, second]) {
    await page.click('.o_async_jobs_toggle', { timeout: PATIENCE });
    await page.waitForSelector('.o_async_job[data-state=succeeded]', { timeout: PATIENCE });
  }
  await admin.waitForSelector('.o_notification', { state: 'detached', timeout: PATIENCE });
  await picture(admin, 'odoo-async-systray');
  const [download] = await Promise.all([admin.waitForEvent('download'), admin.click('.o_async_job_open')]);
  assert.match(download.suggestedFilename(), /res\.partner.*\.xlsx$/);
  assert.equal(readFileSync(await download.path()).subarray(0, 2).toString(), 'PK');
  for (const page of [admin, second]) {
    await page.waitForSelector('.o_async_jobs_toggle', { state: 'detached', timeout: PATIENCE });
  }
});

test('the administrator sees the jobs, and brings a failed one back', async () => {
  await admin.goto(`${A}/odoo/async-jobs`);
  await admin.waitForSelector('.o_list_view .o_data_row', { timeout: PATIENCE });
  await picture(admin, 'odoo-async-list');
  await admin.click('.o_data_row:has(.badge:text("Failed")) td[name=display_name]');
  await admin.waitForSelector('.o_form_view button[name=retry]', { timeout: PATIENCE });
  await picture(admin, 'odoo-async-form');
  const id = sql("SELECT max(id) FROM ir_async WHERE state = 'failed'");
  const errors = () => Number(sql(`SELECT jsonb_array_length(errors) FROM ir_async WHERE id = ${id}`));
  assert.equal(errors(), 1);
  await admin.click('.o_form_view button[name=retry]');
  await until('it has failed again', () => errors() === 2);
});

test('jobs of another database are run there', async () => {
  const there = await login(B);
  const name = `made in b ${Date.now()}`;
  const { result } = await asyncRpc(there, { model: 'res.partner', method: 'create', args: [{ name }] });
  assert.ok(result > 0);
  const count = (database) => Number(sql(`SELECT count(*) FROM res_partner WHERE name = '${name}'`, database));
  assert.deepEqual([count('odoo_a'), count('odoo_b')], [0, 1]);
});
