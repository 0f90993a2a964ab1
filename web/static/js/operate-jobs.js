// The operator's table of all owners' jobs: filter, choose, cancel and retry many.

import { api } from "./api.js";
import { confirmed } from "./confirming.js";
import { byId, h } from "./dom.js";
import { ago, clock, dateAndTime, fileName, number, percent, plural, span } from "./format.js";
import { toast } from "./toasts.js";

const DONE = { cancel: "cancelled", retry: "queued again" };

export class AllJobs {
  #chosen = new Set();
  #cursor = null;
  #form = byId("filter");

  /** `onChange` is called once jobs have been cancelled or retried. */
  constructor(onChange) {
    this.onChange = onChange;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.load();
    });
    this.#form.addEventListener("reset", () => setTimeout(() => this.load()));
    byId("more").addEventListener("click", () => this.load(this.#cursor));
    byId("choose-all").addEventListener("change", (event) => {
      for (const box of byId("jobs").querySelectorAll("input")) this.#choose(box, event.target.checked);
    });
    for (const action of ["cancel", "retry"]) {
      byId(`${action}-chosen`).addEventListener("click", () => this.#act(action, { ids: [...this.#chosen] }, this.#chosen.size));
      byId(`${action}-all`).addEventListener("click", () => this.#actOnAll(action));
    }
    this.load();
  }

  /** Show only these. */
  filter(values) {
    this.#form.reset();
    for (const [name, value] of Object.entries(values)) this.#form.elements[name].value = value;
    byId("all-title").focus();
    byId("all-title").scrollIntoView();
    setTimeout(() => this.load()); // after what the reset has set off
  }

  get #filter() {
    return Object.fromEntries([...new FormData(this.#form)].map(([name, value]) => [name, value.trim()]).filter(([, value]) => value));
  }

  async load(cursor = null) {
    const query = new URLSearchParams({ limit: 50, ...this.#filter, ...(cursor && { cursor }) });
    try {
      const page = await api("GET", `/operate/jobs?${query}`);
      if (!cursor) this.#clear();
      byId("jobs").append(...page.jobs.map((job) => this.#row(job)));
      if (!byId("jobs").childElementCount) byId("jobs").append(h("tr", {}, h("td", { colspan: "9", class: "muted" }, "No job matches.")));
      this.#cursor = page.next_cursor;
      byId("more").hidden = !page.next_cursor;
      byId("jobs-problem").hidden = true;
    } catch (error) {
      byId("jobs-problem").textContent = error.message;
      byId("jobs-problem").hidden = false;
    }
  }

  #clear() {
    this.#chosen.clear();
    byId("choose-all").checked = false;
    byId("jobs").replaceChildren();
    this.#showChosen();
  }

  #row(job) {
    const name = fileName(job.file_path);
    const ran = job.started_at && job.completed_at ? (new Date(job.completed_at) - new Date(job.started_at)) / 1000 : null;
    return h("tr", {},
      h("td", {}, h("input", { type: "checkbox", value: job.id, "aria-label": `Choose ${name}`, onchange: (event) => this.#choose(event.target, event.target.checked) })),
      h("td", { title: job.id }, name),
      h("td", { title: job.owner_id }, job.email ?? job.owner_id),
      h("td", {}, h("span", { class: `status ${job.status}` }, job.status), job.status === "processing" && ` ${percent(job.progress)}`),
      h("td", { class: "number" }, job.audio_seconds ? clock(job.audio_seconds) : "–"),
      h("td", { title: dateAndTime(job.created_at) }, ago(job.created_at)),
      h("td", { class: "number" }, span(ran)),
      h("td", { class: "number" }, job.usage?.estimated_cost > 0 ? `$ ${number(job.usage.estimated_cost, 4)}` : "–"),
      h("td", {}, job.error_code && [h("code", {}, job.error_code), " ", h("span", { class: "muted" }, job.error)]),
    );
  }

  #choose(box, on) {
    box.checked = on;
    if (on) this.#chosen.add(box.value);
    else this.#chosen.delete(box.value);
    this.#showChosen();
  }

  #showChosen() {
    const count = this.#chosen.size;
    byId("chosen").textContent = count ? `${plural(count, "job")} chosen` : "None chosen";
    for (const action of ["cancel", "retry"]) byId(`${action}-chosen`).disabled = !count;
  }

  async #actOnAll(action) {
    const filter = this.#filter;
    const said = Object.entries(filter).map(([name, value]) => `${name.replace("_", " ")} ${value}`).join(", ");
    if (!said) return void toast("Say above which jobs: name a status, an owner or an error code.");
    const what = action === "cancel" ? "Jobs that wait or run are cancelled." : "Failed and cancelled jobs are queued again; what they cost is paid again.";
    const title = action === "cancel" ? "Cancel all that match?" : "Retry all that match?";
    if (await confirmed(title, `${what} Matching: ${said}.`, action === "cancel" ? "Cancel them" : "Retry them")) await this.#act(action, { filter });
  }

  async #act(action, body, asked = null) {
    try {
      let changed = 0;
      for (let more = true; more;) {
        const answer = await api("POST", `/operate/jobs/${action}`, { body });
        changed += answer.changed;
        more = Boolean(body.filter) && answer.more && answer.changed > 0;
      }
      const left = asked ? asked - changed : 0;
      toast(`${plural(changed, "job")} ${DONE[action]}${left > 0 ? `; ${number(left)} could not be, by their status` : ""}`);
    } catch (error) {
      toast(error.message);
    }
    await this.load();
    this.onChange();
  }
}
