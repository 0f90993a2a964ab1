// pg-boss: woken by LISTEN/NOTIFY, fetches batches of as many jobs as run at a time without a pause
// while there are more. https://pgboss.io/api/workers

import { load, main, payload, payloads, now, QUEUE } from "./protocol.mjs";

const { PgBoss } = load("pg-boss");
const pg = load("pg");
const UNFINISHED = `select exists (select from pgboss.job where name = '${QUEUE}'
  and state in ('created', 'retry', 'active')) as unfinished`;

async function start(connectionString, options) {
  const boss = new PgBoss({ connectionString, ...options });
  boss.on("error", (error) => process.stderr.write(`${error.message}\n`));
  await boss.start();
  return boss;
}

async function install(url) {
  const boss = await start(url, { supervise: false, schedule: false });
  await boss.createQueue(QUEUE, { notify: true });
  await boss.stop();
}

async function connect(url) {
  const boss = await start(url, { supervise: false, schedule: false, migrate: false, max: 1 });
  const client = new pg.Client({ connectionString: url });
  client.on("error", () => {});
  await client.connect();
  const db = { executeSql: (text, values) => client.query(text, values) };
  return {
    insert: (number) =>
      number === 1
        ? boss.send(QUEUE, payload())
        : boss.insert(QUEUE, payloads(number).map((data) => ({ data }))),
    commit: async () => {
      await client.query("begin");
      await boss.send(QUEUE, payload(), { db });
      const committing = now();
      await client.query("commit");
      return { committing, committed: now() };
    },
    close: () => Promise.all([boss.stop({ graceful: false }), client.end()]),
  };
}

const AHEAD = 10; // fetched together, to run one after the other

// How soon it finds workers that are silent: by default it looks once a minute.
const supervision = { superviseIntervalSeconds: 1, monitorIntervalSeconds: 1 };

// Nothing notifies of jobs that are to be tried again.
const polling = { pollingIntervalSeconds: 0.5, notifyPollingIntervalSeconds: 0.5 };

const together = (onStart) => (jobs) => Promise.all(jobs.map(onStart));
const inTurn = (onStart) => async (jobs) => {
  for (const job of jobs) await onStart(job);
};

async function work({ url, concurrency, jobs, stall }, onStart) {
  const watcher = new pg.Client({ connectionString: url });
  await watcher.connect();
  const boss = await start(url, { useListenNotify: true, ...(stall ? supervision : {}) });
  if (stall) await boss.updateQueue(QUEUE, { heartbeatSeconds: stall });
  const batchSize = jobs && concurrency === 1 ? AHEAD : concurrency;
  const options = { batchSize, burstWhenBatchFull: batchSize > 1, ...(stall ? polling : {}) };
  await boss.work(QUEUE, options, (concurrency === 1 ? inTurn : together)(onStart));
  return { unfinished: async () => (await watcher.query(UNFINISHED)).rows[0].unfinished };
}

await main({ versions: ["pg-boss"], install, connect, work });
