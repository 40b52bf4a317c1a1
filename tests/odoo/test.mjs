// imbus under a real Odoo, in a real browser. Run by scripts/test_odoo, which sets the stage; by hand:
//
//   KEEP=1 scripts/test_odoo &          prints where all is
//   env $(cat …/env) npm test --prefix tests/odoo
//
// IMBUS_FRONT   the proxy's port: http://a.localhost:PORT and http://b.localhost:PORT are two databases
// IMBUS_BUS     the gateway's port
// PSQL          a psql command, as superuser of the cluster
// RESTART       a command that restarts the cluster
// SCREENSHOTS   a directory for pictures
//
// The websocket lives in a SharedWorker, which no driver of browsers sees into: what the pages show is looked at, and the
// gateway's own view. Waits are on conditions and end after a minute; no time is asserted.

import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { after, before, test } from 'node:test';
import { A, B, PATIENCE, launch, login as logIn, picture, psql, sql, until } from './common.mjs';

const { RESTART } = process.env;
const LOST = 'Real-time connection lost';

let browser;
let admin, demo; // the users' browsers, in database odoo_a

/** The open websockets of a user, by the gateway's view. */
const sockets = (who, database = 'odoo_a') =>
  Number(sql(`SELECT count(*) FROM imbus_stat_connections WHERE subject = '${who}' AND datname = '${database}'`));

const login = (...who) => logIn(browser, ...who);

/** Calls a method of Odoo's as the user of a page. */
const call = (page, model, method, args, kwargs = {}) =>
  page.evaluate(
    async ([model, method, args, kwargs]) => {
      const response = await fetch(`/web/dataset/call_kw/${model}/${method}`, {
        method: 'POST',
        headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify({ jsonrpc: '2.0', method: 'call', id: 1, params: { model, method, args, kwargs } }),
      });
      const { result, error } = await response.json();
      if (error) throw new Error(JSON.stringify(error.data ?? error));
      return result;
    },
    [model, method, args, kwargs],
  );

/** A page in a channel of Discuss. */
async function discuss(user, channel, page = user.page) {
  await page.goto(`${user.site}/odoo/discuss?active_id=discuss.channel_${channel}`);
  await page.waitForSelector('.o-mail-Composer-input', { timeout: PATIENCE });
  return page;
}

async function say(page, text) {
  await page.fill('.o-mail-Composer-input', text);
  await page.press('.o-mail-Composer-input', 'Enter');
}

const shows = (page, text) => until(`the page shows "${text}"`, () => page.evaluate((text) => document.body.innerText.includes(text), text));
const connected = (page) => until('the page is connected', () => page.evaluate((lost) => !document.body.innerText.includes(lost), LOST));

let general; // the id of channel "general"

before(async () => {
  browser = await launch();
  admin = await login(A, 'admin', 'admin');
  const found = await call(admin.page, 'res.users', 'search', [[['login', '=', 'demo']]]);
  if (found.length === 0) {
    await call(admin.page, 'res.users', 'create', [{ name: 'Demo User', login: 'demo', password: 'demo-password' }]);
  }
  [general] = await call(admin.page, 'discuss.channel', 'search', [[['name', '=', 'general']]]);
  demo = await login(A, 'demo', 'demo-password');
});
after(() => browser?.close());

test('a message appears in two tabs and in another browser, without a reload', async () => {
  await discuss(admin, general);
  const second = await discuss(admin, general, await admin.context.newPage());
  await discuss(demo, general);
  for (const page of [admin.page, second, demo.page]) await connected(page);
  await until('the tabs of one browser share a websocket', () => sockets('res.partner(3)') === 1);
  await say(demo.page, 'hello from the other browser');
  await shows(admin.page, 'hello from the other browser');
  await shows(second, 'hello from the other browser');
  await say(second, 'and back again');
  await shows(demo.page, 'and back again');
  await shows(admin.page, 'and back again');
  await picture(admin.page, 'odoo-discuss');
  await second.close();
});

test('a page shows who comes and goes', async () => {
  const partner = (await call(demo.page, 'res.users', 'read', [[await uid(demo.page)], ['partner_id']]))[0].partner_id[0];
  const direct = await until('a direct chat', () => chat(admin.page, partner));
  await discuss(admin, direct);
  const dot = '.o-mail-DiscussContent-headerImStatus i, .o-mail-Discuss-header .o-mail-ImStatus i'; // 19.0, 18.0
  const status = () => admin.page.evaluate((dot) => document.querySelector(dot)?.title, dot);
  const is = (what) => until(`the other user is ${what}`, async () => (await status()) === what);
  await is('Online');
  await picture(admin.page, 'odoo-presence');
  // One of two tabs: still there.
  const extra = await discuss(demo, general, await demo.context.newPage());
  await extra.close();
  await is('Online');
  // The last one.
  await demo.context.close();
  await is('Offline');
  demo = await login(A, 'demo', 'demo-password');
  await discuss(demo, general);
  await is('Online');
});

/** The user's id, as the page knows it. */
const uid = (page) =>
  page.evaluate(async () => {
    const response = await fetch('/web/session/get_session_info', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ jsonrpc: '2.0', method: 'call', id: 1, params: {} }),
    });
    return (await response.json()).result.uid;
  });

/** The id of the direct chat with a partner. */
async function chat(page, partner) {
  const data = await page.evaluate(async (partner) => {
    const response = await fetch('/mail/action', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({
        jsonrpc: '2.0', method: 'call', id: 1,
        params: { fetch_params: [['/discuss/get_or_create_chat', { partners_to: [partner] }]] },
      }),
    });
    return response.json();
  }, partner);
  // 18.0 does not know that route.
  const { 'discuss.channel': channels = [] } = data.result?.['discuss.channel']
    ? data.result
    : await call(page, 'discuss.channel', 'channel_get', [[partner]]);
  return channels.find((channel) => channel.channel_type === 'chat')?.id ?? assert.fail(JSON.stringify(data).slice(0, 500));
}

test('after a restart of the server the page is back by itself, with the message it missed', async () => {
  await discuss(admin, general);
  await connected(admin.page);
  execFileSync('/bin/sh', ['-c', RESTART], { stdio: 'inherit' });
  // Said while the browsers' websockets are still gone, or just back.
  await until('Odoo is back', () => call(demo.page, 'discuss.channel', 'message_post', [[general]], {
    body: 'said after the restart', message_type: 'comment', subtype_xmlid: 'mail.mt_comment',
  }));
  await shows(admin.page, 'said after the restart');
  await connected(admin.page);
  await say(demo.page, 'and it goes on');
  await shows(admin.page, 'and it goes on');
});

test('who logs out has no websocket as that user any more', async () => {
  const other = await login(A, 'demo', 'demo-password');
  await discuss(other, general);
  await connected(other.page);
  const who = sql("SELECT 'res.partner(' || partner_id || ')' FROM res_users WHERE login = 'demo'", 'odoo_a');
  await until('both browsers are connected', () => sockets(who) === 2);
  // In a tab of its own: the other one stays as it is.
  const tab = await other.context.newPage();
  await tab.goto(`${A}/web/session/logout`);
  await until('the session has ended', () => sockets(who) === 1);
  await picture(other.page, 'odoo-logged-out');
  await other.context.close();
});

test('two databases with the same partners never mix', async () => {
  const there = await login(B, 'admin', 'admin');
  const [channel] = await call(there.page, 'discuss.channel', 'search', [[['name', '=', 'general']]]);
  await discuss(there, channel);
  await connected(there.page);
  await discuss(admin, general);
  await connected(admin.page);
  await until('both are connected', () => sockets('res.partner(3)', 'odoo_a') === 1 && sockets('res.partner(3)', 'odoo_b') === 1);
  await say(there.page, 'only in b');
  await say(admin.page, 'only in a');
  await shows(there.page, 'only in b');
  await shows(admin.page, 'only in a');
  assert.equal(await admin.page.evaluate(() => document.body.innerText.includes('only in b')), false);
  assert.equal(await there.page.evaluate(() => document.body.innerText.includes('only in a')), false);
  await there.context.close();
});

test('a trigger of Odoo\'s cron still reaches its processes', async () => {
  const action = await call(admin.page, 'ir.actions.server', 'create', [{
    name: 'trigger', state: 'code', model_id: (await call(admin.page, 'ir.model', 'search', [[['model', '=', 'res.partner']]]))[0],
    code: "env.ref('base.autovacuum_job')._trigger()",
  }]);
  const listener = spawn(...psql('postgres'), { stdio: ['pipe', 'pipe', 'inherit'] });
  let heard = '';
  listener.stdout.on('data', (data) => (heard += data));
  listener.stdin.write('LISTEN cron_trigger;\nSELECT 1;\n');
  await until('psql listens', () => heard.includes('1'));
  await call(admin.page, 'ir.actions.server', 'run', [[action]]);
  await until('the trigger is heard', () => {
    listener.stdin.write('SELECT 1;\n');
    return heard.includes('"cron_trigger" with payload "odoo_a"');
  });
  listener.stdin.end();
});

test('a database without Odoo is served beside them, by tokens', async () => {
  const token = sql(`SELECT bus_token('["news"]')`, 'plain');
  const peek = async () => {
    const reply = await fetch(`http://127.0.0.1:${process.env.IMBUS_BUS}/websocket/peek_notifications?token=${token}`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ jsonrpc: '2.0', method: 'call', id: 1, params: { channels: ['news'], last: 0 } }),
    });
    return (await reply.json()).result.notifications.map(({ message }) => message.payload);
  };
  sql(`SELECT bus_sendone('news', 't', '"in plain"')`, 'plain');
  sql(`SELECT bus_sendone('news', 't', '"in odoo_a"')`, 'odoo_a');
  await until('it has come', async () => (await peek()).includes('in plain'));
  assert.ok(!(await peek()).includes('in odoo_a'));
});

test('names of other records are names, and nothing more', async () => {
  const { result } = await admin.page.evaluate(async () => {
    const response = await fetch('/websocket/peek_notifications', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({
        jsonrpc: '2.0', method: 'call', id: 1,
        params: { channels: ['res.partner_7', '["odoo_a","res.partner",7]', 'odoo-presence-res.partner_999'], last: 0, is_first_poll: true },
      }),
    });
    return response.json();
  });
  const records = result.channels.filter((channel) => channel[1] === 'res.partner' && channel.length === 3);
  assert.deepEqual(records, [['odoo_a', 'res.partner', 3]]);
});

test('a visitor without a session is the public, and hears nothing of users', async () => {
  const before = sockets('res.partner(3)');
  const reply = await fetch(`http://127.0.0.1:${process.env.IMBUS_BUS}/websocket/peek_notifications`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', 'X-Forwarded-Host': new URL(A).host },
    body: JSON.stringify({ jsonrpc: '2.0', method: 'call', id: 1, params: { channels: ['x'], last: 0, is_first_poll: true } }),
  });
  const { result } = await reply.json();
  assert.ok(result.channels.some((channel) => channel[1] === 'broadcast'), JSON.stringify(result));
  assert.ok(!result.channels.some((channel) => channel[1] === 'res.partner'), JSON.stringify(result));
  assert.match(reply.headers.get('set-cookie') ?? '', /^session_id=/);
  assert.equal(sockets('res.partner(3)'), before);
});
