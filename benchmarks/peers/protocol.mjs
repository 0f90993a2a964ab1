// What every peer's process has in common; benchmarks/queue_child.py describes the protocol.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

export const load = createRequire(`${process.env.PEERS}/`);
export const QUEUE = "transcription";
export const payload = () => ({ processing_job_id: crypto.randomUUID() });
export const payloads = (number) => Array.from({ length: number }, payload);
// The same clock as Python's time.monotonic().
export const now = () => Number(process.hrtime.bigint()) / 1e9;

const say = (message) => process.stdout.write(`${JSON.stringify(message)}\n`);
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Runs a peer: `connect(url)` gives {insert, commit, close}, `work(options, onStart)` starts a
// worker and gives {unfinished}.
export async function main({ versions, install, connect, work }) {
  const [role, options] = [process.argv[2], JSON.parse(process.argv[3] ?? "{}")];
  if (role === "version") say({ versions: [...versions.map((name) => [name, version(name)]), ["Node", process.version]] });
  else if (role === "produce") await produce(install, connect);
  else await runWorker(work, options);
  if (role !== "work") process.exit(0);
}

const version = (name) =>
  JSON.parse(readFileSync(`${process.env.PEERS}/node_modules/${name}/package.json`)).version;

async function produce(install, connect) {
  let connection = null;
  for await (const line of createInterface({ input: process.stdin })) {
    const command = JSON.parse(line);
    if (command.install) {
      await install(command.url);
      say({});
    } else if (command.close) {
      await connection?.close();
      connection = null;
      say({});
    } else {
      connection ??= await connect(command.url);
      say(command.pickup ? await connection.commit() : await insert(connection, command));
    }
  }
}

async function insert(connection, { statements, jobs }) {
  const begin = now();
  for (let number = 0; number < statements; number += 1) await connection.insert(jobs);
  return { seconds: now() - begin };
}

async function runWorker(work, options) {
  process.stdin.on("end", () => process.exit(0)).resume();
  let [started, allStarted] = [0, null];
  const done = new Promise((resolve) => (allStarted = resolve));
  const count = () => {
    started += 1;
    if (started === options.jobs) allStarted();
  };
  const tell = () => {
    say({ started: now() });
    return options.behaviour === "hang" ? new Promise(() => {}) : undefined;
  };
  const begin = now();
  const worker = await work(options, options.jobs ? count : tell);
  if (!options.jobs) {
    say({ ready: true });
    return;
  }
  await done;
  while (await worker.unfinished()) await pause(2);
  say({ seconds: now() - begin });
}
