// The add-on in odoo/imbus, in a real browser: jobs from the page's point of view. Set up and run as test.mjs is.

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { after, before, test } from 'node:test';
import { A, B, PATIENCE, launch, login as logIn, picture, sql as query, sqlBeside, until } from './common.mjs';

let browser, admin, second;

const sql = (text, database = 'odoo_a') => query(text, database);
const login = async (site) => (await logIn(browser, site, 'admin', 'admin')).page;

/** The page's own asyncRpc: {result} or {error}. */
const asyncRpc = (page, call) =>
  page.evaluate(async (call) => {
    try {
      return { result: await odoo.__WOWL_DEBUG__.root.env.services.async_job.asyncRpc(call) };
    } catch (error) {
      return { error: { name: error.name, exceptionName: error.exceptionName, message: error.data?.message ?? error.message } };
    }
  }, call);

async function openPartners(page) {
  await page.goto(`${A}/odoo/action-base.action_partner_form?view_type=list`);
  await page.waitForSelector('.o_main_navbar', { timeout: PATIENCE });
}

before(async () => {
  browser = await launch();
  admin = await login(A);
  second = await admin.context().newPage();
  for (const page of [admin, second]) await openPartners(page);
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

/** Opens the export dialog for all records of the list. */
async function openExport(page) {
  await page.waitForSelector('.o_list_view .o_data_row', { timeout: PATIENCE });
  await page.check('.o_list_view thead .o_list_record_selector input');
  await page.click('.o_cp_action_menus .dropdown-toggle');
  await page.click('.o-dropdown--menu .o-dropdown-item:has-text("Export")');
  await page.waitForSelector('.o_export_data_dialog .o_export_field', { timeout: PATIENCE });
}

/** Opens the systray's list in both tabs, where there is one job in this state; what waits below is about that one. */
async function openSystrays(state) {
  for (const page of [admin, second]) {
    await page.click('.o_async_jobs_toggle', { timeout: PATIENCE });
    await page.waitForSelector(`.o_async_job[data-state=${state}]`, { timeout: PATIENCE });
  }
}

/** Both tabs list no job any more. */
async function noSystrays() {
  for (const page of [admin, second]) {
    await page.waitForSelector('.o_async_jobs_toggle', { state: 'detached', timeout: PATIENCE });
  }
}

test('an export goes from the button to the file, and is gone from all tabs', async () => {
  await openExport(admin);
  await picture(admin, 'odoo-async-export');
  await admin.click('.o_async_export');
  // The page is free at once.
  await admin.waitForSelector('.o_export_data_dialog', { state: 'detached', timeout: PATIENCE });
  await openSystrays('succeeded');
  await admin.waitForSelector('.o_notification', { state: 'detached', timeout: PATIENCE });
  await picture(admin, 'odoo-async-systray');
  const [download] = await Promise.all([admin.waitForEvent('download'), admin.click('.o_async_job_open')]);
  assert.match(download.suggestedFilename(), /res\.partner.*\.xlsx$/);
  assert.equal(readFileSync(await download.path()).subarray(0, 2).toString(), 'PK');
  await noSystrays();
});

test('an export that can be imported again has external ids, and the names of fields', async () => {
  await openExport(admin);
  await admin.check('#o-update-data');
  await admin.check('#o_radiocsv');
  await admin.click('.o_async_export');
  await admin.click('.o_async_jobs_toggle', { timeout: PATIENCE });
  const [download] = await Promise.all([
    admin.waitForEvent('download', { timeout: PATIENCE }),
    admin.click('.o_async_job[data-state=succeeded] .o_async_job_open', { timeout: PATIENCE }),
  ]);
  const [header, ...rows] = readFileSync(await download.path(), 'utf8').trim().split(/\r?\n/);
  assert.match(header, /^"id"(,"[a-z_/]+")+$/);
  assert.match(rows.join('\n'), /^"base\.main_partner",/m);
  assert.equal(sql("SELECT queue FROM ir_async WHERE method = '_export' ORDER BY id DESC LIMIT 1"), 'root.export');
  await noSystrays();
});

/** Keeps a partner locked until it is let go: a job that writes it goes on so long. */
async function locked(partner) {
  const name = `imbus test ${partner}`;
  const text = `SET application_name = '${name}'; BEGIN; SELECT FROM res_partner WHERE id = ${partner} FOR UPDATE; SELECT pg_sleep(100)`;
  const ended = sqlBeside(text, 'odoo_a');
  await until('the partner is locked', () => sql(`SELECT count(*) FROM pg_stat_activity WHERE application_name = '${name}' AND query LIKE '%pg_sleep%' AND wait_event = 'PgSleep'`) === '1');
  return async () => {
    sql(`SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = '${name}'`);
    await ended;
  };
}

test('the promise of a job that ends while the bus is away is kept', async () => {
  const id = sql("INSERT INTO res_partner (name, active) VALUES ('Locked', true) RETURNING id");
  const letGo = await locked(id);
  const promise = asyncRpc(admin, { model: 'res.partner', method: 'write', args: [[Number(id)], { name: 'Written' }] });
  const state = () => sql(`SELECT state FROM ir_async WHERE method = 'write' AND res_ids = '[${id}]' ORDER BY id DESC LIMIT 1`);
  await until('the job is at work', () => state() === 'processing');
  // All websockets go, and the call of Odoo with them: the job is run once more.
  sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'imbus gateway'", 'postgres');
  await letGo();
  assert.deepEqual(await promise, { result: true });
  assert.equal(sql(`SELECT name FROM res_partner WHERE id = ${id}`), 'Written');
});

test('a promise is kept where no notification comes', { timeout: 2 * PATIENCE }, async () => {
  const page = await admin.context().newPage();
  await openPartners(page);
  await page.evaluate(() => {
    odoo.__WOWL_DEBUG__.root.env.services.bus_service.stop();
    const { browser } = odoo.loader.modules.get('@web/core/browser/browser');
    const { setTimeout } = browser;
    // Its next question comes when the test says so.
    browser.setTimeout = (callback, delay) => (delay === 15_000 ? (window.ask = callback) && 0 : setTimeout(callback, delay));
  });
  const ask = async () => {
    await page.waitForFunction(() => window.ask, null, { timeout: PATIENCE });
    await page.evaluate(() => {
      const { ask } = window;
      window.ask = null;
      ask();
    });
  };
  const call = { model: 'res.partner', method: 'search_count', args: [[['id', '=', 3]]] };
  const succeeded = "FROM ir_async WHERE method = 'search_count' AND state = 'succeeded'";
  const ended = () => until('the job has ended', () => sql(`SELECT id ${succeeded}`));
  const done = () => until('it is done', () => sql(`SELECT count(*) ${succeeded}`) === '0');
  await done();
  const kept = asyncRpc(page, call);
  await ended();
  await ask();
  assert.deepEqual(await kept, { result: 1 });
  await done();
  const lost = asyncRpc(page, call);
  sql(`DELETE FROM ir_async WHERE id = ${await ended()}`);
  await ask();
  assert.equal((await lost).error.message, 'The job is not kept any more.');
  await page.close();
});

test('a job that has failed without data rejects its promise all the same', { timeout: PATIENCE }, async () => {
  const partner = sql("INSERT INTO res_partner (name, active) VALUES ('Broken', true) RETURNING id");
  const letGo = await locked(partner);
  const promise = asyncRpc(admin, { model: 'res.partner', method: 'write', args: [[Number(partner)], { name: 'No' }] });
  const fail = `SELECT id FROM ir_async, ir_async_fail(id, token, '"it broke"') WHERE res_ids = '[${partner}]' AND state = 'processing'`;
  await until('the job is at work', () => sql(fail));
  const { error } = await promise;
  assert.deepEqual([error.name, error.message], ['RPC_ERROR', 'it broke']);
  await letGo();
});

test('a job that meets a change made beside it is made again, within its one attempt', async () => {
  const id = sql("INSERT INTO res_partner (name, active) VALUES ('Changed', true) RETURNING id");
  // Commits once the job waits for it: Odoo's transaction, which began before, cannot be serialized then.
  const blocked = 'SELECT FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))';
  const change = sqlBeside(
    `UPDATE res_partner SET city = 'Beside' WHERE id = ${id};
     DO $$ BEGIN WHILE NOT EXISTS (${blocked}) LOOP PERFORM pg_sleep(0.05); END LOOP; END $$`,
    'odoo_a',
  );
  await until('the partner is locked', () => sql(`SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'UPDATE res_partner SET city%' AND state = 'active'`) === '1');
  const before = readFileSync(process.env.ODOO_LOG, 'utf8').length;
  const { result } = await asyncRpc(admin, { model: 'res.partner', method: 'write', args: [[Number(id)], { name: 'Written' }] });
  await change;
  assert.equal(result, true);
  assert.equal(sql(`SELECT name || ' ' || city FROM res_partner WHERE id = ${id}`), 'Written Beside');
  assert.equal(sql(`SELECT attempts || ' ' || deaths || ' ' || errors FROM ir_async WHERE res_ids = '[${id}]'`), '1 0 []');
  assert.match(readFileSync(process.env.ODOO_LOG, 'utf8').slice(before), /tries left, try again/);
});

test('the systray shows how far a job is, and cancels it', async () => {
  const id = sql("INSERT INTO res_partner (name, active) VALUES ('Slow', true) RETURNING id");
  const letGo = await locked(id);
  const promise = asyncRpc(admin, { model: 'res.partner', method: 'write', args: [[Number(id)], { name: 'No' }], description: 'Slow work' });
  await second.click('.o_async_jobs_toggle', { timeout: PATIENCE });
  await second.waitForSelector('.o_async_job[data-state=processing]', { timeout: PATIENCE });
  sql("SELECT ir_async_progress(id, token, 40, 'four of ten') FROM ir_async WHERE state = 'processing' AND name = 'Slow work'");
  await second.waitForSelector('.o_async_job .progress[aria-valuenow="40"]', { timeout: PATIENCE });
  await second.waitForSelector('.o_async_job:has-text("four of ten")', { timeout: PATIENCE });
  await picture(second, 'odoo-async-progress');
  await second.click('.o_async_job_remove');
  const { error } = await promise;
  assert.equal(error.message, 'The job was cancelled.');
  await letGo();
  await second.waitForSelector('.o_async_jobs_toggle', { state: 'detached', timeout: PATIENCE });
  assert.equal(sql(`SELECT name FROM res_partner WHERE id = ${id}`), 'Slow');
});

test('a result that nobody wants to open is removed from all tabs', async () => {
  const call = { model: 'res.partner', method: 'search_count', args: [[['id', '=', 3]]], description: 'Counted' };
  assert.equal((await asyncRpc(admin, call)).result, 1);
  await openSystrays('succeeded');
  await second.click('.o_async_job_remove');
  await noSystrays();
  assert.equal(sql("SELECT state FROM ir_async WHERE name = 'Counted'"), 'done');
});

const breaks = { model: 'res.partner', method: 'write', args: [[999999999], { name: 'x' }], description: 'Breaks' };

test('a failure that was seen in one tab is listed in none', async () => {
  await asyncRpc(admin, breaks);
  await openSystrays('failed');
  await second.click('.o_async_job_open');
  await second.click('.modal-footer .btn-primary', { timeout: PATIENCE });
  await noSystrays();
});

test('a failed job is discarded in the systray', async () => {
  await asyncRpc(admin, { ...breaks, description: 'Discarded' });
  await openSystrays('failed');
  await second.click('.o_async_job_remove');
  await noSystrays();
  assert.equal(sql("SELECT state FROM ir_async WHERE name = 'Discarded'"), 'cancelled');
});

/**
 * Enqueues 300 short jobs by this SQL until they have shared requests: not so on a machine that is busy just then, where they are
 * not short. Each time they end in these states.
 */
async function shareRequests(enqueue, expected) {
  const requests = () => readFileSync(process.env.ODOO_LOG, 'utf8').split('POST /imbus/async/run').length;
  const states = () => sql("SELECT string_agg(state || ' ' || n, ', ' ORDER BY state) FROM (SELECT state, count(*) n FROM ir_async WHERE queue = 'many' GROUP BY 1) s");
  let shared = false;
  for (let round = 0; round < 5 && !shared; round++) {
    const before = requests();
    sql(`SELECT ${enqueue} FROM generate_series(1, 300) n`);
    await until('all have ended', () => sql("SELECT count(*) FROM ir_async WHERE queue = 'many' AND finished_at IS NULL") === '0');
    assert.equal(states(), expected);
    assert.equal(sql("SELECT max(attempts) || ' ' || max(deaths) FROM ir_async WHERE queue = 'many'"), '1 0');
    shared = requests() - before < 150;
    sql("DELETE FROM ir_async WHERE queue = 'many'");
  }
  assert.ok(shared, 'each round took more than half as many requests as jobs');
}

test('many short jobs share requests, and one that fails takes no other along', () =>
  shareRequests(
    `ir_async_call(CASE n WHEN 150 THEN 'no_such_method' ELSE 'search_count' END, CASE n WHEN 150 THEN '[]' ELSE '[[]]' END::jsonb,
       model => 'res.partner', user_id => 2, queue => 'many')`,
    'failed 1, succeeded 299',
  ));

// Behind pgbouncer, who rolls back may go on in any session.
test('what a job leaves in its session, the next one in the same request does not find', { skip: Boolean(process.env.PGBOUNCER) }, async () => {
  const code = `
# A method may do so.
if env.context['async_job_id'] % 2:
    env.cr.rollback()
env.cr.execute("""SELECT current_setting('work_mem') = '7MB', to_regclass('pg_temp.left_over') IS NOT NULL,
    EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())""")
found = env.cr.fetchone()
if any(found):
    raise UserError(str(found))
env.cr.execute("SET work_mem = '7MB'; CREATE TEMP TABLE left_over (); SELECT pg_advisory_lock_shared(1)")`;
  const values = { name: 'Leaves things', model_id: Number(sql("SELECT id FROM ir_model WHERE model = 'res.partner'")), state: 'code', code };
  const id = await admin.evaluate(
    async (values) => (await odoo.__WOWL_DEBUG__.root.env.services.orm.create('ir.actions.server', [values]))[0],
    values,
  );
  await shareRequests(`ir_async_call('run', model => 'ir.actions.server', res_ids => '{${id}}', user_id => 2, queue => 'many')`, 'succeeded 300');
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

test('the administrator discards it', async () => {
  const id = sql("SELECT max(id) FROM ir_async WHERE state = 'failed'");
  await admin.reload();
  await admin.click('.o_form_view button[name=cancel]:has-text("Discard")', { timeout: PATIENCE });
  await until('it is cancelled', () => sql(`SELECT state FROM ir_async WHERE id = ${id}`) === 'cancelled');
});

test('jobs of another database are run there', async () => {
  const there = await login(B);
  const name = `made in b ${Date.now()}`;
  const { result } = await asyncRpc(there, { model: 'res.partner', method: 'create', args: [{ name }] });
  assert.ok(result > 0);
  const count = (database) => Number(sql(`SELECT count(*) FROM res_partner WHERE name = '${name}'`, database));
  assert.deepEqual([count('odoo_a'), count('odoo_b')], [0, 1]);
});
