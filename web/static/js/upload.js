// Getting files into storage. Small ones in one request, large ones by TUS (https://tus.io), which goes on where it
// broke off, also after the page was closed and the same file is chosen again.

import { api, ApiError, Unreachable } from "./api.js";

const TRIES = 8; // in a row without a byte of progress
const LONGEST_PAUSE = 15_000; // milliseconds
const TUS = { "Tus-Resumable": "1.0.0" };
const KEPT = "pgscribe.upload ";
const PASSING = new Set([0, 408, 409, 423, 425, 429, 500, 502, 503, 504]);

/** The file is not as it was when it was chosen. */
class Unreadable extends Error {
  constructor(file) {
    super(`“${file.name}” can't be read: it was moved or changed, or is a folder. Choose it again.`);
    this.code = "unreadable";
  }
}

/**
 * Upload a file. Returns its path in storage, and a function to call once that is used: until then the same file,
 * chosen again, need not be sent again. `onProgress(share)`; `onTrouble()`: it is tried again in a moment.
 * Throws ApiError, Unreachable, Unreadable, AbortError.
 */
export function upload(file, { onProgress = () => {}, onTrouble = () => {}, signal } = {}) {
  const watch = { onProgress, onTrouble, signal };
  return alone(keyOf(file), async (isAlone) => {
    if (!isAlone) return { filePath: await begin(file, watch), done: () => {} };
    const filePath = (await goOn(file, watch)) ?? (await begin(file, watch, remember));
    return { filePath, done: () => forget(file) };
  });
}

// An upload that is going on, here or in another tab, is not gone on with twice. Pages under plain http can't know.
function alone(key, run) {
  if (!navigator.locks) return run(true);
  return navigator.locks.request(key, { ifAvailable: true }, (lock) => run(Boolean(lock)));
}

async function goOn(file, watch) {
  const kept = recall(file);
  if (!kept) return null;
  try {
    await new Tus(file, kept.ticket, watch, { location: kept.location }).run();
    return kept.ticket.filePath;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    forget(file); // it has expired, or has gone: begin anew
    return null;
  }
}

async function begin(file, watch, onBegun = () => {}) {
  const ticket = await api("POST", "/uploads", {
    body: { name: file.name, size: file.size, contentType: file.type.slice(0, 200) || null },
    signal: watch.signal,
  });
  if (ticket.method === "PUT") await put(file, ticket, watch);
  else await new Tus(file, ticket, watch, { onBegun }).run();
  return ticket.filePath;
}

async function put(file, ticket, { onProgress, onTrouble, signal }) {
  const pauses = new Pauses(file, onTrouble, signal);
  for (;;) {
    const answer = await send("PUT", ticket.url, ticket.headers, file, (sent) => onProgress(sent / file.size), signal);
    // Nothing is replaced, and it is there whole or not at all: so it was the answer that got lost.
    if (answer.ok || (answer.status === 409 && pauses.tried)) return;
    if (!PASSING.has(answer.status) || answer.status === 409) throw answer.error();
    await pauses.next(answer);
  }
}

class Tus {
  constructor(file, ticket, { onProgress, onTrouble, signal }, { location = null, onBegun = () => {} }) {
    Object.assign(this, { file, ticket, location, onProgress, onTrouble, onBegun, signal });
  }

  async run() {
    this.signal?.addEventListener("abort", () => this.#abandon(), { once: true });
    const pauses = new Pauses(this.file, this.onTrouble, this.signal);
    let offset = null;
    while (offset !== this.file.size) {
      const before = offset;
      const answer = await this.#step(offset);
      if (answer.ok) {
        offset = answer.offset;
        if (offset > (before ?? -1)) pauses.reset();
        this.onProgress(offset / this.file.size);
      } else if (PASSING.has(answer.status)) {
        offset = null; // ask how much has arrived
        await pauses.next(answer);
      } else {
        throw answer.error();
      }
    }
  }

  async #step(offset) {
    if (!this.location) return this.#create();
    if (offset === null) return this.#read(await this.#request("HEAD"));
    const chunk = this.file.slice(offset, offset + this.ticket.chunkSize);
    const headers = { "Upload-Offset": String(offset), "Content-Type": "application/offset+octet-stream" };
    const progress = (sent) => this.onProgress((offset + sent) / this.file.size);
    return this.#read(await this.#request("PATCH", headers, chunk, progress));
  }

  async #create() {
    const metadata = Object.entries(this.ticket.metadata ?? {})
      .map(([key, value]) => `${key} ${btoa(String.fromCharCode(...new TextEncoder().encode(value)))}`);
    const headers = { "Upload-Length": String(this.file.size), "Upload-Metadata": metadata.join(",") };
    const answer = await this.#request("POST", headers);
    const location = answer.header("Location");
    if (answer.ok && location) {
      // Only its last part is taken over, so that no answer can send the file elsewhere.
      const name = new URL(location, this.#endpoint).pathname.split("/").pop();
      this.location = this.ticket.url.endsWith(`/${name}`) ? this.ticket.url : `${this.ticket.url}/${name}`;
      this.onBegun(this.file, this.ticket, this.location);
      answer.offset = 0;
    }
    return answer;
  }

  /** Say that what has arrived is no longer wanted; if that gets lost, the server forgets it by itself. */
  #abandon() {
    if (recall(this.file)?.location === this.location) forget(this.file);
    if (this.location) fetch(this.location, { method: "DELETE", headers: { ...TUS, ...this.ticket.headers }, keepalive: true }).catch(() => {});
  }

  #read(answer) {
    answer.offset = Number(answer.header("Upload-Offset"));
    if (answer.ok && !(answer.offset >= 0 && answer.offset <= this.file.size)) answer.status = 0;
    return answer;
  }

  get #endpoint() {
    return new URL(this.ticket.url, location.href);
  }

  #request(method, headers = {}, body = null, onSent = () => {}) {
    const url = method === "POST" ? this.ticket.url : this.location;
    return send(method, url, { ...TUS, ...this.ticket.headers, ...headers }, body, onSent, this.signal);
  }
}

// fetch does not tell how much it has sent; XMLHttpRequest does.
function send(method, url, headers, body, onSent, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const abort = () => request.abort();
    const finish = () => {
      signal?.removeEventListener("abort", abort);
      resolve(new Answer(request));
    };
    if (signal?.aborted) return void reject(signal.reason);
    signal?.addEventListener("abort", abort);
    request.open(method, url);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onSent(event.loaded);
    request.onload = request.onerror = request.ontimeout = finish;
    request.onabort = () => reject(signal?.reason ?? new DOMException("", "AbortError"));
    request.send(body);
  });
}

class Answer {
  constructor(request) {
    this.request = request;
    this.status = request.status;
    this.offset = null;
  }

  get ok() {
    return this.status >= 200 && this.status < 300;
  }

  header(name) {
    return this.request.getResponseHeader(name);
  }

  error() {
    if (!this.status) return new Unreachable();
    let problem = {};
    try {
      problem = JSON.parse(this.request.responseText);
    } catch {
      // not in our form
    }
    return new ApiError(this.status, problem);
  }
}

class Pauses {
  tried = 0;

  constructor(file, onTrouble, signal) {
    Object.assign(this, { file, onTrouble, signal });
  }

  reset() {
    this.tried = 0;
  }

  /** Wait before another try, or until the connection is back. Throws the answer's error after too many. */
  async next(answer) {
    this.tried += 1;
    if (!answer.status) await this.#checkFile();
    this.onTrouble();
    if (this.tried >= TRIES && navigator.onLine) throw answer.error();
    await new Promise((resolve, reject) => {
      const timer = setTimeout(done, Math.min(LONGEST_PAUSE, 500 * 2 ** this.tried) * (0.5 + Math.random() / 2));
      addEventListener("online", done);
      this.signal?.addEventListener("abort", done);
      const signal = this.signal;
      function done() {
        clearTimeout(timer);
        removeEventListener("online", done);
        signal?.removeEventListener("abort", done);
        if (signal?.aborted) reject(signal.reason);
        else resolve();
      }
    });
  }

  // A browser says the same of a file that it can't read and of a server that does not answer.
  async #checkFile() {
    try {
      await this.file.slice(0, 1).arrayBuffer();
    } catch {
      throw new Unreadable(this.file);
    }
  }
}

const keyOf = (file) => `${KEPT}${document.body.dataset.user} ${file.name} ${file.size} ${file.lastModified}`;

function remember(file, ticket, location) {
  try {
    localStorage.setItem(keyOf(file), JSON.stringify({ ticket, location }));
  } catch {
    // full, or not allowed: then it is not resumed after a reload
  }
}

function recall(file) {
  try {
    const kept = JSON.parse(localStorage.getItem(keyOf(file)));
    if (kept && new Date(kept.ticket.expiresAt) > new Date()) return kept;
  } catch {
    // nothing usable
  }
  forget(file);
  return null;
}

function forget(file) {
  try {
    localStorage.removeItem(keyOf(file));
  } catch {
    // nothing was kept
  }
}

/** Forget what can't be gone on with any more, or all that is kept. */
export function forgetUploads({ all = false } = {}) {
  try {
    for (const key of Object.keys(localStorage).filter((key) => key.startsWith(KEPT))) {
      const expires = JSON.parse(localStorage.getItem(key))?.ticket?.expiresAt;
      if (all || !(new Date(expires) > new Date())) localStorage.removeItem(key);
    }
  } catch {
    // storage is not allowed here
  }
}
