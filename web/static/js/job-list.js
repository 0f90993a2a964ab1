// The list of jobs: a row for each, kept up to date.

import { api, ApiError } from "./api.js";
import { h } from "./dom.js";
import { ago, clock, dateAndTime, fileName, percent } from "./format.js";
import { Estimates, leftInWords } from "./progress.js";
import { hitsOf } from "./search.js";
import { toast } from "./toasts.js";

const TICK = 1000; // milliseconds between two looks at the clock
const UNDO_SECONDS = 7;
const ENDED = new Set(["completed", "failed", "cancelled"]);

export class JobList {
  filter = ""; // a status, or "" for all
  onChange = () => {};
  onRestored = () => {}; // a job that was to be deleted is not, and is not shown either
  #rows = new Map(); // by job id
  #latest = new Map(); // states by job id, also of jobs that are not shown
  #estimates = new Estimates();
  #pending = new Map(); // jobs that are deleted unless somebody undoes it: by id, what does it now
  #gone = new Set(); // ids of jobs that are deleted
  #news = new Set(); // ids of jobs that were heard of since a list was asked for
  #found = false; // whether results of a search are shown
  #last = null; // the oldest job that is shown, if there are more: those come when they are asked for

  constructor(element, heading) {
    this.element = element;
    this.heading = heading; // takes the focus where a row with it goes
    setInterval(() => this.#tick(), TICK);
    addEventListener("pagehide", () => this.#deletePending({ keepalive: true }));
    // Whoever has signed out can't delete any more.
    const signOut = document.querySelector("form.account");
    signOut?.addEventListener("submit", async (event) => {
      if (!this.#pending.size) return;
      event.preventDefault();
      await this.#deletePending();
      signOut.submit();
    });
  }

  #deletePending(options = {}) {
    return Promise.all([...this.#pending.values()].map((deletion) => deletion.now(options)));
  }

  get size() {
    return this.#rows.size;
  }

  has(id) {
    return this.#rows.has(id);
  }

  /** Say that a list is asked for: what is heard of from now on is newer. */
  expect() {
    this.#news.clear();
  }

  /** Show these jobs, and what has come since they were asked for. Rows that stay keep the focus. */
  show(jobs, { more }) {
    if (this.#found) this.#clear(false);
    const wanted = new Set(jobs.map((job) => job.id));
    this.add(jobs, { more });
    for (const [id, { job }] of [...this.#rows]) {
      if (!wanted.has(id) && (!this.#news.has(id) || this.#isBelow(job))) this.remove(id);
    }
  }

  /** Show older ones, too. */
  add(jobs, { more }) {
    this.#last = more ? jobs.at(-1) : null;
    for (const job of jobs) this.#take(job);
  }

  /** Show results of a search instead of what is there. */
  showFound(results) {
    this.#clear(true);
    for (const result of results.filter(({ id }) => !this.#pending.has(id) && !this.#gone.has(id))) {
      const row = new Row({ ...result, status: "completed", progress: 1 }, this.#actions);
      row.tick(this.#estimates);
      row.element.append(hitsOf(result));
      this.#rows.set(result.id, row);
      this.element.append(row.element);
    }
  }

  #clear(found) {
    this.#last = null;
    this.#found = found;
    this.#rows.clear();
    this.element.replaceChildren();
  }

  /** Take in a job's state as it is now. Returns what there is to say of it, if anything. */
  put(job) {
    this.#news.add(job.id);
    return this.#take(job);
  }

  #take(job) {
    if (this.#pending.has(job.id) || this.#gone.has(job.id)) return null;
    // A list that was asked for earlier may come after an event.
    const known = this.#latest.get(job.id);
    if (known && new Date(known.updated_at) > new Date(job.updated_at)) job = { ...job, ...known };
    this.#latest.set(job.id, job);
    this.#estimates.note(job);
    const row = this.#rows.get(job.id);
    if (this.#found) return null;
    if (this.filter && job.status !== this.filter) {
      if (row) this.remove(job.id);
      return null;
    }
    const before = row?.job.status;
    if (row) row.update(job, this.#estimates);
    else if (this.#isBelow(job)) return null;
    else this.#insert(new Row(job, this.#actions));
    this.onChange();
    return before && before !== job.status && ENDED.has(job.status) ? `${fileName(job.file_path)}: ${job.status}` : null;
  }

  #isBelow(job) {
    return this.#last !== null && older(job, this.#last);
  }

  #insert(row) {
    row.update(row.job, this.#estimates);
    const later = [...this.#rows.values()].find((other) => older(other.job, row.job));
    this.#rows.set(row.job.id, row);
    this.element.insertBefore(row.element, later?.element ?? null);
    if (later) this.#rows = new Map([...this.#rows].sort(([, one], [, other]) => (older(one.job, other.job) ? 1 : -1)));
  }

  /** Take a job off for good: it is deleted. */
  gone(id) {
    this.#gone.add(id);
    this.#pending.delete(id);
    this.#latest.delete(id);
    this.remove(id);
  }

  /** Put the focus on a job's name. */
  focus(id) {
    this.#rows.get(id)?.name.focus();
  }

  /** Put the focus on the job below the newest so many. */
  focusBelow(count) {
    [...this.#rows.values()][count]?.name.focus({ preventScroll: true });
  }

  remove(id) {
    const row = this.#rows.get(id);
    if (!row) return;
    const focused = row.element.contains(document.activeElement);
    const next = row.element.nextElementSibling ?? row.element.previousElementSibling;
    row.element.remove();
    this.#rows.delete(id);
    if (focused) (next?.querySelector("a") ?? this.heading).focus();
    this.onChange();
  }

  #tick() {
    for (const row of this.#rows.values()) row.tick(this.#estimates);
  }

  #actions = {
    cancel: (job) => this.#act(job, "cancel", `Cancelling ${fileName(job.file_path)}`),
    retry: (job) => this.#act(job, "retry", `${fileName(job.file_path)} is queued again`),
    delete: (job, event) => this.#delete(job, event),
  };

  async #act(job, action, said) {
    try {
      this.put(await api("POST", `/jobs/${job.id}/${action}`));
      toast(said);
    } catch (error) {
      toast(error.message);
    }
  }

  #delete(job, event) {
    this.remove(job.id);
    const restore = () => {
      this.#pending.delete(job.id);
      if (!this.#found) this.put(job);
      return this.has(job.id) ? null : this.onRestored();
    };
    const undo = async () => {
      await restore();
      this.focus(job.id);
    };
    const now = async (options = {}) => {
      if (this.#gone.has(job.id)) return;
      try {
        await api("DELETE", `/jobs/${job.id}`, options);
        this.gone(job.id);
      } catch (error) {
        if (error instanceof ApiError && error.status === 404) return void this.gone(job.id);
        restore();
        toast(`${fileName(job.file_path)} was not deleted. ${error.message}`);
      }
    };
    this.#pending.set(job.id, { now });
    toast(`Deleted ${fileName(job.file_path)} and its recording`, {
      action: { label: "Undo", run: undo },
      seconds: UNDO_SECONDS,
      focused: event.detail === 0, // by keyboard, from which it would be far away
      onGone: now,
    });
  }
}

// Times come in several forms, so they are compared as what they mean.
const older = (one, other) => new Date(one.created_at) - new Date(other.created_at) < 0
  || (new Date(one.created_at) - new Date(other.created_at) === 0 && one.id < other.id);

class Row {
  constructor(job, actions) {
    this.job = job;
    this.actions = actions;
    this.name = h("a", { class: "name" });
    this.status = h("span");
    this.length = h("span", { class: "number" });
    this.created = h("time");
    this.buttons = h("div", { class: "actions" });
    this.bar = h("progress", { max: 1 });
    this.left = h("span", { class: "number" });
    this.work = h("div", { class: "work", hidden: true }, this.bar, this.left);
    this.problem = h("p", { class: "problem", hidden: true });
    this.element = h(
      "li",
      { class: "job" },
      h("div", {}, this.name, h("div", { class: "about" }, this.status, this.length, this.created)),
      this.buttons, this.work, this.problem,
    );
    this.#fill();
  }

  update(job, estimates) {
    const before = this.job;
    this.job = { ...this.job, ...job };
    const cancelling = (one) => Boolean(one.cancel_requested_at);
    if (this.job.status !== before.status || cancelling(this.job) !== cancelling(before)) this.#renew();
    this.#fill();
    this.tick(estimates);
  }

  #fill() {
    const { job } = this;
    const name = fileName(job.file_path);
    this.element.dataset.id = job.id;
    this.name.textContent = name;
    this.name.href = `/app/jobs/${job.id}`;
    this.status.className = `status ${job.status}`;
    this.status.textContent = statusInWords(job);
    this.length.textContent = job.audio_seconds ? clock(job.audio_seconds) : "";
    this.created.dateTime = job.created_at;
    this.created.title = dateAndTime(job.created_at);
    this.work.hidden = job.status !== "processing";
    this.bar.value = job.progress;
    this.bar.setAttribute("aria-label", `Progress of ${name}`);
    this.problem.hidden = !(job.error && job.status !== "completed" && job.status !== "cancelled");
    this.problem.textContent = job.status === "failed" ? job.error : `Trying again after: ${job.error}`;
    if (!this.buttons.childElementCount) this.#renew();
  }

  #renew() {
    const { job, actions } = this;
    const button = (label, act) => h(
      "button",
      { type: "button", class: "quiet", "aria-label": `${label} ${fileName(job.file_path)}`, onclick: (event) => act(this.job, event) },
      label,
    );
    const focused = this.buttons.contains(document.activeElement) && document.activeElement.textContent;
    this.buttons.replaceChildren(
      ...(ENDED.has(job.status) || job.cancel_requested_at ? [] : [button("Cancel", actions.cancel)]),
      ...(["failed", "cancelled"].includes(job.status) ? [button("Retry", actions.retry)] : []),
      ...(ENDED.has(job.status) ? [button("Delete", actions.delete)] : []),
    );
    // Never on another action, which a key that was meant for the one before would run.
    if (focused) ([...this.buttons.children].find(({ textContent }) => textContent === focused) ?? this.name).focus();
  }

  tick(estimates) {
    const { job } = this;
    this.created.textContent = ago(job.created_at);
    if (job.status === "processing") {
      const parts = [job.note, percent(job.progress), leftInWords(estimates.left(job.id))];
      this.left.textContent = parts.filter(Boolean).join(" · ");
    } else if (job.status === "queued") {
      this.status.textContent = statusInWords(job);
    }
  }
}

function statusInWords(job) {
  if (job.status === "queued" && job.due_at && new Date(job.due_at) > Date.now()) return `Starts ${ago(job.due_at)}`;
  if (job.cancel_requested_at && !ENDED.has(job.status)) return "Cancelling";
  return job.status[0].toUpperCase() + job.status.slice(1);
}
