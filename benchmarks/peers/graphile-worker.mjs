// graphile-worker, as its guide to performance says: a local queue of one job more than run at a
// time, and ends in batches. https://worker.graphile.org/docs/performance

import { load, main, payload, payloads, now, QUEUE } from "./protocol.mjs";

const { Logger, makeWorkerUtils, run } = load("graphile-worker");
const pg = load("pg");
const logger = new Logger(() => (level, message) => {
  if (level === "error") process.stderr.write(`${message}\n`);
});
const UNFINISHED = "select exists (select from graphile_worker._private_jobs) as unfinished";

async function install(connectionString) {
  const utils = await makeWorkerUtils({ connectionString, logger });
  await utils.migrate();
  await utils.release();
}

async function connect(connectionString) {
  const pool = new pg.Pool({ connectionString, max: 1 });
  const ignore = () => {}; // The database may be gone before the pool's last connection is.
  pool.on("error", ignore).on("connect", (client) => client.on("error", ignore));
  const utils = await makeWorkerUtils({ pgPool: pool, logger });
  return {
    insert: (number) =>
      number === 1
        ? utils.addJob(QUEUE, payload())
        : utils.addJobs(payloads(number).map((job) => ({ identifier: QUEUE, payload: job }))),
    commit: () =>
      utils.withPgClient(async (client) => {
        await client.query("begin");
        await client.query("select graphile_worker.add_job($1, $2)", [QUEUE, payload()]);
        const committing = now();
        await client.query("commit");
        return { committing, committed: now() };
      }),
    close: () => utils.release().then(() => pool.end()),
  };
}

async function work({ url, concurrency }, onStart) {
  const watcher = new pg.Client({ connectionString: url });
  await watcher.connect();
  await run({
    taskList: { [QUEUE]: onStart },
    noHandleSignals: true,
    logger,
    preset: {
      worker: {
        connectionString: url,
        concurrentJobs: concurrency,
        maxPoolSize: Math.max(10, concurrency + 2),
        localQueue: { size: concurrency + 1 },
        completeJobBatchDelay: 0,
        failJobBatchDelay: 0,
      },
    },
  });
  return { unfinished: async () => (await watcher.query(UNFINISHED)).rows[0].unfinished };
}

await main({ versions: ["graphile-worker"], install, connect, work });
