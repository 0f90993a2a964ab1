// The page of one job: its progress and partial text while it runs, then the player with the text in step.

import { api, ask } from "./api.js";
import { byId, icon } from "./dom.js";
import { Find } from "./find.js";
import { clock, dateAndTime, dollars, percent } from "./format.js";
import { follow } from "./live.js";
import { asMenu } from "./menu.js";
import { Player } from "./player.js";
import { Estimates, leftInWords } from "./progress.js";
import { toast } from "./toasts.js";
import { TranscriptView } from "./transcript.js";

const id = byId("job").dataset.job;
const path = `/jobs/${id}`;
const ENDED = new Set(["completed", "failed", "cancelled"]);
const HINTS = {
  no_speech: "Nobody is heard in it. If that is wrong, record closer to the microphone, or try the option that levels the sound.",
  file_not_found: "The recording is no longer in storage. Upload it again.",
  invalid_audio: "Is it a recording? Play it on your own machine, convert it to mp3, m4a or wav, and upload that.",
  truncated_audio: "The file ends before the recording does. Upload it again, whole.",
  audio_too_long: "Cut it into shorter parts, or ask whoever runs this for a higher limit.",
  quota_exceeded: "Wait for the next month, or ask whoever runs this for a higher limit.",
  model_unavailable: "Choose another model, or ask whoever runs this to install it.",
  worker_lost: "Several machines broke down while they worked on it. It may work now.",
};

const estimates = new Estimates();
let job = null;
let text = "";
let language = null;
let view = null;
let player = null;
let stream = null;
let again = () => act("retry");

function show(state) {
  job = { ...job, ...state };
  estimates.note(job);
  const running = !ENDED.has(job.status);
  const failed = job.status === "failed" || job.status === "cancelled";
  byId("status").className = `status ${job.status}`;
  const cancelling = running && job.cancel_requested_at;
  byId("status").textContent = cancelling ? "Cancelling" : job.status[0].toUpperCase() + job.status.slice(1);
  byId("cancel").hidden = Boolean(cancelling);
  byId("about").textContent = aboutJob();
  byId("work").hidden = !running;
  byId("partial").hidden = !running || !text;
  byId("failure").hidden = !failed;
  byId("result").hidden = job.status !== "completed";
  if (running) showWork();
  if (failed) showFailure();
}

function aboutJob() {
  const { options = {}, usage } = job;
  return [
    job.audio_seconds && clock(job.audio_seconds),
    language && new Intl.DisplayNames(["en"], { type: "language" }).of(language),
    options.model && `${options.model} model`,
    options.task === "translate" && "translated into English",
    dateAndTime(job.created_at),
    usage?.estimated_cost > 0 && dollars(usage.estimated_cost),
  ].filter(Boolean).join(" · ");
}

function showWork() {
  const waits = job.status === "queued";
  const again = job.error ? `Trying again after: ${job.error}` : null;
  const due = waits && job.due_at && new Date(job.due_at) > Date.now() ? `Starts at ${dateAndTime(job.due_at)}` : null;
  byId("work-text").textContent = waits ? [due ?? "Waiting for a machine", again].filter(Boolean).join(". ")
    : [job.note, percent(job.progress), leftInWords(estimates.left(id))].filter(Boolean).join(" · ");
  byId("progress").value = job.progress;
  byId("progress").hidden = waits;
}

function showFailure() {
  byId("failure-title").textContent = job.status === "failed" ? "This recording could not be transcribed" : "Cancelled";
  byId("failure-text").textContent = job.status === "failed" ? job.error : "You can run it again; the recording is still there.";
  byId("failure-hint").textContent = job.status === "failed" ? [HINTS[job.error_code], `(${job.error_code})`].filter(Boolean).join(" ") : "";
}

function takeText(partial) {
  text = text.slice(0, partial.offset) + partial.text;
  byId("partial-text").textContent = text;
  byId("partial").hidden = !text || ENDED.has(job?.status);
}

async function load() {
  show(await api("GET", `${path}?result=false`));
  if (job.status === "completed") await showResult();
  else if (!ENDED.has(job.status)) watch();
}

function watch() {
  stream?.close();
  stream = follow(`${path}/events`, {
    job(state) {
      show(state);
      if (!ENDED.has(state.status)) return;
      stream.close();
      byId("news").textContent = `${byId("name").textContent}: ${state.status}`;
      if (state.status === "completed") load().catch(fail);
    },
    partial: takeText,
    deleted: () => fail({ status: 404, message: "It has just been deleted." }),
  });
}

async function showResult() {
  const [transcript, waveform] = await Promise.all([
    api("GET", `${path}/transcript.json`),
    api("GET", `${path}/waveform`).catch(() => ({ peaks: [] })),
  ]);
  language = transcript.language;
  byId("about").textContent = aboutJob();
  byId("player").hidden = false;
  const duration = transcript.duration;
  player = new Player({ source: `${path}/audio`, duration, peaks: waveform.peaks });
  view = new TranscriptView(byId("segments"), transcript, player, { path, translated: job.options.task === "translate" });
  const find = new Find(view);
  view.onWords = (segment) => find.renew(segment);
  view.onChange = () => {
    find.update();
    showDoubts();
  };
  player.onTime = (time, playing) => view.light(time, playing);
  showDoubts();
  const at = Number(new URLSearchParams(location.search).get("t"));
  if (at > 0) {
    player.seek(at);
    view.goTo(at);
  }
}

function showDoubts() {
  const count = view.doubtful.length;
  player.mark(view.doubtful.map(({ data }) => [data.start, data.end]));
  byId("doubts").hidden = !count;
  byId("doubts").textContent = count === 1 ? "1 doubtful segment" : `${count} doubtful segments`;
}

function fail(error) {
  stream?.close();
  for (const id of ["work", "partial", "result", "player"]) byId(id).hidden = true;
  byId("status").textContent = byId("status").className = "";
  byId("failure").hidden = false;
  byId("retry").hidden = error.status === 404;
  again = () => location.reload();
  byId("failure-title").textContent = error.status === 404 ? "There is no such transcript" : "This could not be loaded";
  byId("failure-text").textContent = error.message;
}

async function act(action) {
  try {
    show(await api("POST", `${path}/${action}`));
    if (!ENDED.has(job.status)) {
      takeText({ offset: 0, text: "" });
      watch();
    }
  } catch (error) {
    toast(error.message);
  }
}

byId("previous").append(icon("up"));
byId("next").append(icon("down"));
byId("cancel").addEventListener("click", () => act("cancel"));
byId("retry").addEventListener("click", () => again());
byId("doubts").addEventListener("click", () => view.nextDoubtful());
byId("copy").addEventListener("click", async () => {
  const text = ask("GET", `${path}/transcript.txt`)
    .then(async (response) => new Blob([await response.text()], { type: "text/plain" }));
  try {
    // Handed over at once and filled later: Safari lets nobody write who has waited first.
    await navigator.clipboard.write([new ClipboardItem({ "text/plain": text })]);
    toast("The text is on the clipboard");
  } catch {
    const refused = await text.then(() => null, (error) => error);
    toast(refused ? `Not copied. ${refused.message}` : "The browser did not allow copying. Export it as text instead.");
  }
});
asMenu(byId("export"));
setInterval(() => job && !byId("work").hidden && showWork(), 1000);
load().catch(fail);
