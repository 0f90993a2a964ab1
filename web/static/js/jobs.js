// The page of one's jobs: upload, watch, find.

import { api } from "./api.js";
import { byId, h } from "./dom.js";
import { JobList } from "./job-list.js";
import { follow } from "./live.js";
import { searchTranscripts } from "./search.js";
import { Uploads } from "./uploads.js";

const SEARCH_AFTER = 250; // milliseconds without a key

const list = new JobList(byId("jobs"), byId("jobs-title"));
let search = null;
let nextPage = null;

new Uploads((job) => list.put(job));

async function load() {
  byId("jobs").setAttribute("aria-busy", "true");
  byId("problem").hidden = true;
  search?.abort();
  search = new AbortController();
  const { signal } = search;
  const q = byId("search").elements.q.value.trim();
  try {
    if (q) await find(q, signal);
    else await loadPage(null, signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
  }
  if (!signal.aborted) byId("jobs").setAttribute("aria-busy", "false");
}

async function loadPage(cursor, signal) {
  const query = new URLSearchParams({ limit: 50 });
  if (list.filter) query.set("status", list.filter);
  if (cursor) query.set("cursor", cursor);
  const page = await api("GET", `/jobs?${query}`, { signal });
  if (cursor) list.add(page.jobs);
  else list.show(page.jobs);
  setMore(page.next_cursor);
  showEmpty();
}

async function find(q, signal) {
  const { results, next } = await searchTranscripts(q, signal);
  list.showFound(results);
  setMore(null);
  byId("news").textContent = results.length ? `Found in ${results.length} transcripts` : "Nothing found";
  const more = next ? "There are more: add a word that is rarer." : "";
  showEmpty(results.length ? more : `No transcript has “${q}”.`);
}

function setMore(cursor) {
  nextPage = cursor;
  byId("more").hidden = !cursor;
}

function showEmpty(text = null) {
  const ofFilter = list.filter ? `Nothing is ${list.filter}.` : "Nothing here yet. Drop a recording above to begin.";
  byId("empty").textContent = text ?? (list.size ? "" : ofFilter);
  byId("empty").hidden = !byId("empty").textContent;
}

byId("filter").addEventListener("change", (event) => {
  list.filter = event.target.value;
  byId("search").reset();
  load();
});
byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  load();
});
let typing;
byId("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(load, SEARCH_AFTER);
});
byId("more").addEventListener("click", () => loadPage(nextPage).catch((error) => {
  byId("problem").replaceChildren(h("span", {}, error.message));
  byId("problem").hidden = false;
}));
list.onChange = () => showEmpty();

let connectedBefore = false;
follow("/jobs/events", {
  snapshot({ jobs, gap }) {
    for (const job of jobs) list.put(job);
    if (gap || connectedBefore) load(); // something may have been missed while nobody looked
    connectedBefore = true;
  },
  job(job) {
    const news = list.put(job);
    if (news) byId("news").textContent = news;
  },
  deleted: ({ id }) => list.remove(id),
}, (up) => {
  byId("live").classList.toggle("connected", up);
  byId("live").textContent = up ? "Live" : "Connecting";
});
load();
