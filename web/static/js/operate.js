// The operator's page: how the queue is, who works, who waits, what fails and what it costs.

import { api } from "./api.js";
import { barChart } from "./charts.js";
import { confirmed } from "./confirming.js";
import { byId, h, update } from "./dom.js";
import { ago, dateAndTime, dollars, fileName, number, percent, plural, span } from "./format.js";
import { AllJobs } from "./operate-jobs.js";
import { Deliveries } from "./operate-webhooks.js";
import { toast } from "./toasts.js";

const EVERY = 5000; // milliseconds

let overview = null;
let timer = null;
let asked = 0;
const drawn = new Map();
const jobs = new AllJobs(() => refresh());
new Deliveries(() => refresh());

async function refresh() {
  clearTimeout(timer);
  const question = ++asked;
  try {
    const answer = await api("GET", `/operate/overview?hours=${byId("hours").value}`);
    if (question !== asked) return; // it was about another period, or from before something was done
    overview = answer;
    byId("problem").hidden = true;
    show();
  } catch (error) {
    if (question !== asked) return;
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
  }
  const up = byId("problem").hidden;
  byId("live").classList.toggle("connected", up);
  byId("live").textContent = up ? "Live" : "Not up to date";
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, EVERY);
}

function show() {
  showQueue();
  showFigures();
  showWebhooks();
  showThroughput();
  showCosts();
  rows("workers", overview.workers.map(worker), "No worker is running. Start one with pgscribe worker.", 4);
  rows("owners", overview.owners.map(owner), "Nobody has jobs.", 9);
  rows("failures", overview.failures.map(failure), "Nothing has failed.", 5);
}

function rows(id, found, otherwise, columns) {
  update(byId(id), found.length ? found : [h("tr", {}, h("td", { colspan: String(columns), class: "muted" }, otherwise))]);
}

function showQueue() {
  const { paused_at: paused } = overview.queue;
  byId("pause").disabled = false;
  byId("pause").textContent = paused ? "Resume the queue" : "Pause the queue";
  byId("paused").hidden = !paused;
  byId("paused").textContent = paused ? `The queue has been paused since ${dateAndTime(paused)}: no job starts, running ones go on.` : "";
}

const figure = (name, value, more = "") => h("div", { class: "card figure" }, h("dt", {}, name), h("dd", {}, value, more && [" ", h("small", {}, more)]));
const both = ({ p50, p95 }) => [span(p50), p95 === null ? "" : `95 % within ${span(p95)}`];

function showWebhooks() {
  const { queued, waiting, sending, delivered, failed, seconds, oldest_queued_seconds: oldest, disabled_endpoints: disabled } = overview.webhooks;
  update(byId("webhook-figures"), [
    figure("To be sent", number(queued + sending), oldest === null ? "" : `oldest ${span(oldest)}`),
    figure("To be tried again", number(waiting)),
    figure("Delivered", number(delivered)),
    figure("Not delivered", number(failed), disabled ? `${plural(disabled, "endpoint")} disabled` : ""),
    figure("Told within", ...both(seconds)),
  ]);
}

function showFigures() {
  const { queue, ended, times } = overview;
  const { queued, scheduled, processing } = queue.states;
  const alive = overview.workers.filter((one) => one.alive).length;
  const silent = overview.workers.length - alive;
  const ended_count = ended.completed + ended.failed;
  update(byId("figures"), [
    figure("Queued", number(queued), queue.oldest_queued_seconds === null ? "" : `oldest ${span(queue.oldest_queued_seconds)}`),
    figure("Audio that waits", span(queue.queued_audio_seconds), "estimated"),
    figure("Processing", number(processing)),
    figure("Scheduled", number(scheduled), "for later, or again"),
    figure("Workers", number(alive), silent ? `${number(silent)} silent` : ""),
    figure("Completed", number(ended.completed), `${span(ended.audio_seconds)} of audio`),
    figure("Failed", number(ended.failed), ended_count ? percent(ended.failed / ended_count) : ""),
    figure("Wait", ...both(times.wait)),
    figure("Run", ...both(times.run)),
    figure("Speed", times.real_time_factor.p50 === null ? "–" : `${number(times.real_time_factor.p50, 1)}×`, "real time"),
  ]);
}

function showThroughput() {
  const short = overview.hours <= 48;
  const bars = overview.throughput.map((bucket) => {
    const at = new Date(bucket.at);
    const label = short ? at.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit" })
      : at.toLocaleDateString(undefined, { month: "short", day: "numeric" });
    const said = `${bucket.completed} completed, ${bucket.failed} failed, ${bucket.cancelled} cancelled, ${span(bucket.audio_seconds)} of audio`;
    return { label, title: `${dateAndTime(at)}:\n${said}`, values: [bucket.completed, bucket.failed, bucket.cancelled] };
  });
  draw("throughput", { bars, series: ["Completed", "Failed", "Cancelled"], caption: "Jobs that ended, over time", whole: true });
}

function showCosts() {
  const bars = overview.costs.map((day) => {
    const date = new Date(`${day.day}T00:00:00Z`);
    const label = date.toLocaleDateString(undefined, { month: "short", day: "numeric", timeZone: "UTC" });
    const said = `${dollars(day.estimated_cost)}, ${number(day.gpu_seconds)} GPU-seconds, ${number(day.cpu_seconds)} CPU-seconds, ${plural(day.jobs, "job")}, ${span(day.audio_seconds)} of audio`;
    return { label, title: `${day.day}:\n${said}`, values: [day.estimated_cost] };
  });
  draw("costs", { bars, series: ["Dollars, estimated"], caption: "Estimated cost per day (UTC), in dollars", unit: dollars });
}

/** Draw a chart, leaving its table open if it is, and alone if nothing has changed. */
function draw(id, chart) {
  const place = byId(id);
  const width = Math.max(260, place.clientWidth);
  const state = JSON.stringify([width, chart.bars]);
  if (drawn.get(id) === state) return;
  drawn.set(id, state);
  const table = place.querySelector("details");
  const focused = table?.contains(document.activeElement);
  place.replaceChildren(barChart({ ...chart, width }));
  place.querySelector("details").open = table?.open ?? false;
  if (focused) place.querySelector("summary").focus();
}

function worker({ id, alive, last_heartbeat, holds }) {
  return h("tr", {},
    h("td", {}, String(id)),
    h("td", {}, h("span", { class: `status ${alive ? "completed" : "failed"}` }, alive ? "Alive" : "Silent")),
    h("td", {}, last_heartbeat ? ago(last_heartbeat) : "–"),
    h("td", {}, holds.length ? h("ul", {}, holds.map((job) => h("li", {},
      `${fileName(job.file_path)}, ${percent(job.progress)} `,
      h("span", { class: "muted" }, `${job.email ?? job.owner_id}, since ${ago(job.started_at)}${job.attempt > 1 ? `, attempt ${job.attempt}` : ""}`),
    ))) : h("span", { class: "muted" }, "nothing")),
  );
}

function owner(one) {
  const name = one.email ?? one.owner_id;
  const action = one.paused_at ? "resume" : "pause";
  const label = one.paused_at ? "Resume" : "Pause";
  return h("tr", {},
    h("td", { class: "name" }, name, one.paused_at && [" ", h("span", { class: "status" }, "Paused")]),
    h("td", { class: "number" }, number(one.queued)),
    h("td", { class: "number" }, number(one.processing)),
    h("td", { class: "number" }, span(one.waiting_audio_seconds)),
    h("td", { class: "number" }, span(one.audio_seconds)),
    h("td", { class: "share" }, h("meter", { min: 0, max: 1, value: one.share, title: percent(one.share), "aria-label": `Share of ${name}` }), ` ${percent(one.share)}`),
    h("td", { class: "number" }, number(one.weight, 2)),
    h("td", { class: "number" }, number(one.max_running)),
    h("td", {}, h("div", { class: "actions" },
      h("button", { type: "button", class: "quiet", "aria-label": `${label} ${name}`, "data-key": `pause ${one.owner_id}`, onclick: () => pauseOwner(one.owner_id, action) }, label),
      h("button", { type: "button", class: "quiet", "aria-label": `Jobs of ${name}`, "data-key": `jobs ${one.owner_id}`, onclick: () => jobs.filter({ owner: one.owner_id }) }, "Jobs"))),
  );
}

function failure(one) {
  return h("tr", {},
    h("td", {}, h("code", {}, one.error_code)),
    h("td", { class: "number" }, number(one.jobs)),
    h("td", {}, ago(one.last_at)),
    h("td", { class: "name" }, one.example),
    h("td", {}, h("button", { type: "button", class: "quiet", "aria-label": `Jobs with ${one.error_code}`, "data-key": one.error_code, onclick: () => jobs.filter({ status: "failed", error_code: one.error_code }) }, "Jobs")),
  );
}

async function pauseOwner(id, action) {
  await run(() => api("POST", `/operate/owners/${id}/${action}`), action === "pause" ? "No more of their jobs start" : "Their jobs start again");
}

async function run(act, said) {
  try {
    await act();
    toast(said);
  } catch (error) {
    toast(error.message);
  }
  await refresh();
}

byId("pause").addEventListener("click", async () => {
  const pausing = !overview.queue.paused_at;
  if (pausing && !await confirmed("Pause the queue?", "No job starts until you resume it. Running jobs go on.", "Pause")) return;
  await run(() => api("POST", `/operate/queue/${pausing ? "pause" : "resume"}`), pausing ? "The queue is paused" : "The queue goes on");
});
byId("hours").addEventListener("change", refresh);
new ResizeObserver(() => overview && (showThroughput(), showCosts())).observe(byId("throughput"));
document.addEventListener("visibilitychange", () => document.hidden || refresh());
refresh();
