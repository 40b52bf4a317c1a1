// The live page in a real browser.
//
//   apt-get install chromium            (or CHROMIUM=/path/to/it)
//   npm ci --prefix tests/page
//   IMBUS_URL=http://127.0.0.1:8072/imbus npm test --prefix tests/page
//
// IMBUS_URL     the page of a running gateway; http://127.0.0.1:8072/imbus if not set. With ?token=, the page passes
//               the token on. Without traffic the figures that move are the gateway's uptime and clock, and that is enough.
// SCREENSHOTS   a directory: the page as it then is, dark, light and narrow, is written there as page-*.png.
// SETTLE        seconds to watch before those screenshots are taken, so that the plots have something to show.
// CHROMIUM      the browser; /usr/bin/chromium if not set.
//
// The first tests use the gateway's own feed. The others put messages of their own into the page's websocket, to show
// what no healthy gateway sends. Waits are on conditions and end after 20 seconds; no time is asserted.

import assert from 'node:assert/strict';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { chromium } from 'playwright-core';

const address = new URL(process.env.IMBUS_URL ?? 'http://127.0.0.1:8072/imbus');
if (address.pathname === '/') address.pathname = '/imbus';
const FEED = (url) => url.pathname === address.pathname + '/live';
const PATIENCE = 20_000;

let browser;
before(async () => {
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'],
  });
});
after(() => browser?.close());

/** Waits until the function says something true in the page. */
async function until(page, what, condition, argument) {
  const end = Date.now() + PATIENCE;
  for (;;) {
    const result = await page.evaluate(condition, argument);
    if (result) return result;
    if (Date.now() > end) {
      const seen = await page.evaluate(() => `${document.body.dataset.state}: ${document.body.innerText.slice(0, 1500)}`);
      assert.fail(`waited in vain until ${what}; the page says: ${seen}`);
    }
    await new Promise((done) => setTimeout(done, 100));
  }
}

/** A page and what it did that it must not: errors, requests to others. `feed` takes the place of the gateway's. */
async function open(t, options = {}, feed = null) {
  const context = await browser.newContext({ viewport: { width: 1440, height: 1000 }, ...options });
  t.after(() => context.close());
  const page = await context.newPage();
  const faults = [];
  const foreign = (url) => {
    const { host, protocol } = new URL(url);
    if (host !== address.host && protocol !== 'data:') faults.push('a request to ' + url);
  };
  page.on('console', (message) => {
    if (message.type() === 'error' || message.type() === 'warning') faults.push(message.type() + ': ' + message.text());
  });
  page.on('pageerror', (error) => faults.push('exception: ' + error.stack));
  page.on('dialog', (dialog) => { faults.push('a dialog'); dialog.dismiss(); });
  page.on('request', (request) => foreign(request.url()));
  page.on('websocket', (socket) => foreign(socket.url()));
  if (feed) await page.routeWebSocket(FEED, feed);
  const response = await page.goto(address.href);
  assert.equal(response.status(), 200, await response.text());
  return { page, faults, response };
}

const live = (page, samples = 1) => until(page, 'the page is live', (least) =>
  document.body.dataset.state === 'live' && Number(document.body.dataset.samples) >= least, samples);
const textOf = (page, selector) => page.evaluate((one) => document.querySelector(one)?.textContent ?? null, selector);
const figure = (page, label) => page.evaluate((wanted) => {
  const boxes = [...document.querySelectorAll('#figures > div')];
  const box = boxes.find((one) => one.querySelector('dt').textContent === wanted);
  return box?.querySelector('.value').textContent.trim() ?? null;
}, label);

/** A message of the feed, `seconds` after its beginning. */
function message(seconds, change = {}) {
  const sent = 1000 + 50 * seconds;
  return {
    version: '0', now: 1_800_000_000_000 + 1000 * seconds, uptime_s: 100 + seconds,
    gateway: {
      connections: 7, subscriptions: 70, sockets: 9, queued_bytes: 2048, connections_total: 7,
      notifications_sent_total: sent, frames_sent_total: sent / 2, messages_received_total: 0, bytes_sent_total: 0,
      bytes_received_total: 0, slow_consumers_total: 0, replays_total: 0, rejected: { origin: 2, slow: 3 },
    },
    latency: { le_ms: [1, 2, 4], counts: [sent / 2, sent, sent, sent], sum_ms: sent, count: sent },
    databases: [], slow: [], queues: [], failed_jobs: [], ...change,
  };
}

test('the numbers move, nothing comes from elsewhere and nothing is wrong', async (t) => {
  const { page, faults, response } = await open(t);
  assert.match(response.headers()['content-security-policy'] ?? '', /default-src 'none'/);
  assert.match(response.headers()['content-type'], /text\/html; *charset=utf-8/i);
  await live(page, 3);
  assert.equal(await page.title(), 'imbus');
  await page.getByRole('radio', { name: '1 min', exact: true }).check();
  const uptime = await textOf(page, '#uptime');
  const plots = await page.evaluate(() => [...document.querySelectorAll('canvas')].map((one) => one.toDataURL()));
  assert.equal(plots.length, 8);
  await until(page, 'the uptime moves', (old) => document.querySelector('#uptime').textContent !== old, uptime);
  await until(page, 'every plot moves', (old) =>
    [...document.querySelectorAll('canvas')].every((one, i) => one.toDataURL() !== old[i]), plots);
  for (const label of ['Connections', 'Subscriptions', 'Clients refused']) {
    assert.match(await figure(page, label), /^[\d,]+$/, label);
  }
  assert.match(await figure(page, 'Notifications sent'), /^[\d.,]+[kMG]? ?\/s$/);
  assert.match(await textOf(page, '#version'), /^\d+\.\d+/);
  assert.deepEqual(faults, []);
});

test('while it is paused nothing moves, and then it goes on', async (t) => {
  const { page, faults } = await open(t);
  await live(page, 2);
  await page.getByRole('button', { name: 'Pause' }).click();
  const held = await textOf(page, '#uptime');
  const samples = await page.evaluate(() => Number(document.body.dataset.samples));
  await until(page, 'more came', (before) => Number(document.body.dataset.samples) >= before + 2, samples);
  assert.equal(await textOf(page, '#uptime'), held);
  await page.getByRole('button', { name: 'Pause' }).click();
  await until(page, 'it goes on', (old) => document.querySelector('#uptime').textContent !== old, held);
  assert.deepEqual(faults, []);
});

test('a lost connection is said, and made again', async (t) => {
  const sockets = [];
  const { page } = await open(t, {}, (socket) => { socket.connectToServer(); sockets.push(socket); });
  await live(page);
  await sockets[0].close({ code: 1001, reason: 'restart' });
  await until(page, 'the banner shows', () => !document.querySelector('#banner').hidden);
  assert.match(await textOf(page, '#trouble'), /Connection lost at \d\d:\d\d:\d\d/);
  await live(page);
  assert.equal(await page.evaluate(() => document.querySelector('#banner').hidden), true);
  assert.equal(sockets.length, 2);
});

test('who is refused is told what to do, and the page does not try for ever', async (t) => {
  let tries = 0;
  const { page } = await open(t, {}, (socket) => {
    tries += 1;
    socket.close({ code: 4401, reason: 'token expired' });
  });
  await until(page, 'the page says so', () => document.body.dataset.state === 'denied');
  assert.match(await textOf(page, '#banner'), /401.*token expired.*http:\/\/127\.0\.0\.1:\d+\/imbus.*\?token=/s);
  assert.equal(tries, 1);
});

test('rates and percentiles are differences, and a counter that falls is a restart', async (t) => {
  let socket;
  const { page, faults } = await open(t, {}, (one) => { socket = one; });
  const send = (...all) => socket.send(JSON.stringify(message(...all)));
  await until(page, 'the page has connected', () => document.body.dataset.state === 'connecting');
  for (const second of [0, 1, 2]) send(second);
  await until(page, 'three are there', () => document.body.dataset.samples === '3');
  await until(page, 'the rate is right', () => document.querySelector('#figures').textContent.includes('50 /s'));
  assert.equal(await figure(page, 'Notifications sent'), '50 /s');
  assert.equal(await figure(page, 'Commit to send, p99'), '1.98 ms');
  assert.equal(await figure(page, 'Queued for clients'), '2.00 KiB');
  assert.equal(await figure(page, 'Clients refused'), '2');
  send(3, { uptime_s: 1, gateway: { ...message(0).gateway, notifications_sent_total: 3 } });
  await until(page, 'the restart shows', () => samples.at(-1).restart);
  await until(page, 'no rate is made of it', () => !document.querySelector('#figures').textContent.includes('50 /s'));
  assert.equal(await figure(page, 'Notifications sent'), '—');
  send(13);
  await until(page, 'a silence is a gap', () => samples.at(-1).broken);
  assert.deepEqual(faults, []);
});

test('hostile strings are text, and what is missing is a dash', async (t) => {
  let socket;
  const evil = '<img src=x onerror=alert(1)><script>alert(2)</script>';
  const { page, faults } = await open(t, {}, (one) => { socket = one; });
  await until(page, 'the page has connected', () => document.body.dataset.state === 'connecting');
  for (const nonsense of ['', '[]', 'null', '7', '{"gateway": 1, "databases"', '\u0000']) socket.send(nonsense);
  socket.send(JSON.stringify({
    now: 1_799_999_999_000, gateway: 'x', latency: { le_ms: 'x', counts: [null] }, databases: [null, 1, {}], slow: {},
    queues: [[]],
  }));
  socket.send(JSON.stringify(message(0, {
    version: evil,
    gateway: { rejected: { [evil]: 1, __proto__x: 2, constructor: 3 } },
    databases: [{ oid: 1, name: evil, state: evil, dispatched_total: 'x' }, { oid: evil, state: 'constructor' }, {}],
    slow: [
      { id: evil, database: evil, address: evil, subject: '\u202Eabc\u0000', user_agent: evil.repeat(5000), queued: -1 },
      {},
    ],
    queues: [{ database: evil, queue: evil, waiting: evil }],
    failed_jobs: [{ database: evil, id: evil, name: evil, error: evil, at: 1e300 }, { at: 'x' }],
  })));
  await until(page, 'the rows show', () => document.querySelector('main').textContent.includes('onerror=alert(1)'));
  const found = await page.evaluate(() => ({
    elements: document.querySelectorAll('main img, main td script, main a, main iframe').length,
    reordered: /[\u202a-\u202e\u0000]/.test(document.body.textContent),
    longest: Math.max(...[...document.querySelectorAll('td')].map((cell) => cell.textContent.length)),
    dashes: [...document.querySelectorAll('td')].filter((cell) => cell.textContent === '—').length,
  }));
  assert.equal(found.elements, 0);
  assert.equal(found.reordered, false);
  assert.ok(found.longest <= 2001, `${found.longest} characters`);
  assert.ok(found.dashes > 5);
  assert.equal(await figure(page, 'Connections'), '—');
  assert.deepEqual(faults, []);
});

for (const [name, options] of Object.entries({
  light: { colorScheme: 'light' },
  dark: { colorScheme: 'dark' },
  narrow: { colorScheme: 'light', viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, hasTouch: true },
})) {
  test(`it fits and follows the system's colours: ${name}`, async (t) => {
    const { page, faults } = await open(t, options);
    await live(page, 1 + Number(process.env.SCREENSHOTS ? process.env.SETTLE ?? 0 : 0));
    assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), options.colorScheme);
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.equal(width, page.viewportSize().width, 'it scrolls sideways');
    const directory = process.env.SCREENSHOTS;
    if (directory) {
      await mkdir(directory, { recursive: true });
      await page.screenshot({ path: join(directory, `page-${name}.png`), fullPage: name !== 'narrow' });
    }
    assert.deepEqual(faults, []);
  });
}

test('the theme chosen and the time shown are remembered', async (t) => {
  const { page, faults } = await open(t, { colorScheme: 'light' });
  const theme = () => page.evaluate(() => document.documentElement.dataset.theme);
  await page.getByRole('radio', { name: 'Dark', exact: true }).check();
  await page.getByRole('radio', { name: '5 min', exact: true }).check();
  assert.equal(await theme(), 'dark');
  await page.reload();
  assert.equal(await theme(), 'dark');
  assert.equal(await page.evaluate(() => document.querySelector('#span :checked').value), '5');
  assert.deepEqual(faults, []);
});

test('the keyboard reads the plots and sorts the tables', async (t) => {
  let socket;
  const { page, faults } = await open(t, {}, (one) => { socket = one; });
  await until(page, 'the page has connected', () => document.body.dataset.state === 'connecting');
  const queues = ['a', 'b', 'c'].map((queue, i) => ({ database: 'd', queue, waiting: [2, 3, 1][i] }));
  for (let i = 0; i < 9; i += 1) {
    socket.send(JSON.stringify(message(i, { queues, gateway: { ...message(i).gateway, connections: 100 + i } })));
  }
  const shown = 'figure .legend b';
  await until(page, 'the last shows', (value) => document.querySelector(value).textContent === '108', shown);
  await page.locator('figure').first().focus();
  for (let i = 0; i < 2; i += 1) await page.keyboard.press('ArrowLeft');
  await until(page, 'an earlier one shows', (value) => Number(document.querySelector(value).textContent) < 108, shown);
  await page.keyboard.press('Escape');
  await until(page, 'the last shows again', (value) => document.querySelector(value).textContent === '108', shown);
  await page.getByRole('button', { name: 'Waiting' }).focus();
  await page.keyboard.press('Enter');
  const order = await page.getByRole('table', { name: 'Queues' }).locator('tbody td:nth-child(2)').allTextContents();
  assert.deepEqual(order, ['b', 'a', 'c']);
  assert.equal(await page.getByRole('columnheader', { name: 'Waiting' }).getAttribute('aria-sort'), 'descending');
  assert.deepEqual(faults, []);
});
