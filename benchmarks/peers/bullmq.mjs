// BullMQ, with the defaults of its guide; a worker's retries without a limit as it asks for.
// https://docs.bullmq.io/guide/workers

import { load, main, payload, payloads, now, QUEUE } from "./protocol.mjs";

const { Queue, Worker } = load("bullmq");

async function connect(url) {
  const queue = new Queue(QUEUE, { connection: { url } });
  await queue.waitUntilReady();
  return {
    insert: (number) =>
      number === 1
        ? queue.add(QUEUE, payload())
        : queue.addBulk(payloads(number).map((data) => ({ name: QUEUE, data }))),
    commit: async () => {
      const committing = now();
      await queue.add(QUEUE, payload());
      return { committing, committed: now() };
    },
    close: () => queue.close(),
  };
}

async function work({ url, concurrency, stall }, onStart) {
  const queue = new Queue(QUEUE, { connection: { url } });
  const sooner = stall ? { lockDuration: stall * 1000, stalledInterval: stall * 1000 } : {};
  const worker = new Worker(QUEUE, async () => onStart(), {
    connection: { url, maxRetriesPerRequest: null },
    concurrency,
    ...sooner,
  });
  worker.on("error", (error) => process.stderr.write(`${error.message}\n`));
  await worker.waitUntilReady();
  const unfinished = async () => (await queue.getJobCountByTypes("wait", "active", "delayed")) > 0;
  return { unfinished };
}

await main({ versions: ["bullmq"], install: async () => {}, connect, work });
