// The page of one's jobs: upload, watch, find.

import { api } from "./api.js";
import { byId } from "./dom.js";
import { fileName, plural } from "./format.js";
import { JobList } from "./job-list.js";
import { follow } from "./live.js";
import { searchTranscripts } from "./search.js";
import { toast } from "./toasts.js";
import { Uploads } from "./uploads.js";

const SEARCH_AFTER = 250; // milliseconds without a key
const PAGE = 50;

const list = new JobList(byId("jobs"), byId("jobs-title"));
let asking = null; // what is asked for at the moment, to break it off
let nextPage = null;
let wanted = PAGE; // jobs that are to be shown, if there are so many
let searched = ""; // what the results that are shown were searched for
let moreFound = false;

new Uploads((job) => {
  list.put(job);
  if (!list.has(job.id)) toast(`${fileName(job.file_path)} is queued`);
});

/** Show what is wanted now: what is searched for, or so many jobs of the filter. */
async function load() {
  byId("jobs").setAttribute("aria-busy", "true");
  byId("problem").hidden = true;
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  const q = byId("search").elements.q.value.trim();
  remember(q ? { q } : list.filter ? { status: list.filter } : {});
  try {
    if (q) await find(q, signal);
    else await loadJobs(signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    showProblem(error);
  }
  if (!signal.aborted) byId("jobs").setAttribute("aria-busy", "false");
}

// What is chosen is in the address: it is there again after a look at a transcript, or a reload.
function remember(chosen) {
  const query = new URLSearchParams(chosen).toString();
  history.replaceState(null, "", query ? `?${query}` : location.pathname);
}

function recall() {
  const query = new URLSearchParams(location.search);
  const status = query.get("status") ?? "";
  if ([...byId("filter").elements].some((choice) => choice.value === status)) showFilter(status);
  byId("search").elements.q.value = query.get("q") ?? "";
}

async function loadJobs(signal) {
  list.expect();
  const jobs = [];
  let cursor = null;
  do {
    const page = await askPage(cursor, signal);
    jobs.push(...page.jobs);
    cursor = page.next_cursor;
  } while (cursor && jobs.length < wanted);
  searched = "";
  setMore(cursor);
  list.show(jobs, { more: cursor !== null });
  showEmpty();
}

function askPage(cursor, signal) {
  const query = new URLSearchParams({ limit: PAGE });
  if (list.filter) query.set("status", list.filter);
  if (cursor) query.set("cursor", cursor);
  return api("GET", `/jobs?${query}`, { signal });
}

async function loadMore() {
  const focused = document.activeElement === byId("more");
  const before = list.size;
  wanted = before + PAGE;
  await load();
  if (focused && list.size > before) list.focusBelow(before);
}

async function find(q, signal) {
  const { results, next } = await searchTranscripts(q, signal);
  showFilter("");
  searched = q;
  moreFound = Boolean(next);
  setMore(null);
  list.showFound(results);
  byId("news").textContent = list.size ? `Found in ${plural(list.size, "transcript")}` : "Nothing found";
  showEmpty();
}

// A search looks into all transcripts.
function showFilter(status) {
  list.filter = status;
  byId("filter").querySelector(`[value="${status}"]`).checked = true;
}

function setMore(cursor) {
  nextPage = cursor;
  byId("more").hidden = !cursor;
}

function showEmpty() {
  byId("empty").textContent = searched ? saidOfSearch() : saidOfList();
  byId("empty").hidden = !byId("empty").textContent;
}

function saidOfSearch() {
  if (!list.size) return `No transcript has “${searched}”.`;
  return moreFound ? "There are more: add a word that is rarer." : "";
}

function saidOfList() {
  if (list.size || nextPage) return "";
  return list.filter ? `Nothing is ${list.filter}.` : "Nothing here yet. Drop a recording above to begin.";
}

function showProblem(error) {
  byId("problem").textContent = error.message;
  byId("problem").hidden = false;
}

byId("filter").addEventListener("change", (event) => {
  list.filter = event.target.value;
  wanted = PAGE;
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
byId("more").addEventListener("click", loadMore);
list.onChange = showEmpty;
list.onRestored = load;

let connected = false;

// Live is what is connected, and has been read since.
function showLive(live) {
  byId("live").classList.toggle("connected", live);
  byId("live").textContent = live ? "Live" : "Connecting";
}

follow("/jobs/events", {
  async snapshot({ jobs }) {
    for (const job of jobs) list.put(job);
    // It has active jobs only: what ended before it, after the list was read, nobody tells.
    if (!searched) await load();
    showLive(connected);
  },
  job(job) {
    const news = list.put(job);
    if (news) byId("news").textContent = news;
  },
  deleted: ({ id }) => list.gone(id),
}, (up) => {
  connected = up;
  if (!up) showLive(false);
});
recall();
load();
