// The operator's table of all owners' jobs: filter, choose, cancel and retry many.

import { api } from "./api.js";
import { Choice } from "./choosing.js";
import { confirmed } from "./confirming.js";
import { byId, h } from "./dom.js";
import { ago, clock, dateAndTime, dollars, fileName, number, percent, plural, span } from "./format.js";
import { toast } from "./toasts.js";

const AT_ONCE = 1000; // jobs in one request, as the API allows
const DONE = { cancel: "cancelled", retry: "queued again" };

export class AllJobs {
  #choice = new Choice("jobs", "choose-all", (count) => this.#showChosen(count));
  #cursor = null;
  #shown = {};
  #asked = 0;
  #form = byId("filter");

  /** `onChange` is called once jobs have been cancelled or retried. */
  constructor(onChange) {
    this.onChange = onChange;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.load();
    });
    this.#form.addEventListener("reset", () => setTimeout(() => this.load()));
    this.#form.elements.status.addEventListener("change", () => this.load());
    byId("more").addEventListener("click", () => this.load(this.#cursor));
    for (const action of ["cancel", "retry"]) {
      byId(`${action}-chosen`).addEventListener("click", () => this.#act(action, this.#choice.ids));
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

  /** Show what matches or, after `cursor`, more of what is shown. Returns whether that worked. */
  async load(cursor = null) {
    const question = ++this.#asked;
    const filter = cursor ? this.#shown : this.#filter;
    const query = new URLSearchParams({ limit: 50, ...filter, ...(cursor && { cursor }) });
    try {
      const page = await api("GET", `/operate/jobs?${query}`);
      if (question !== this.#asked) return false;
      if (!cursor) this.#clear();
      this.#shown = filter;
      byId("jobs").append(...page.jobs.map((job) => this.#row(job)));
      if (!byId("jobs").childElementCount) byId("jobs").append(h("tr", {}, h("td", { colspan: "9", class: "muted" }, "No job matches.")));
      this.#cursor = page.next_cursor;
      byId("more").hidden = !page.next_cursor;
      byId("jobs-problem").hidden = true;
      this.#choice.show();
      return true;
    } catch (error) {
      if (question !== this.#asked) return false;
      byId("jobs-problem").textContent = error.message;
      byId("jobs-problem").hidden = false;
      return false;
    }
  }

  #clear() {
    this.#choice.clear();
    byId("jobs").replaceChildren();
  }

  #row(job) {
    const name = fileName(job.file_path);
    const ran = job.started_at && job.completed_at ? (new Date(job.completed_at) - new Date(job.started_at)) / 1000 : null;
    return h("tr", {},
      h("td", {}, this.#choice.box(job.id, `Choose ${name}`)),
      h("td", { class: "name", title: job.id }, name),
      h("td", { class: "owner", title: job.owner_id }, job.email ?? job.owner_id),
      h("td", {}, h("span", { class: `status ${job.status}` }, job.status), job.status === "processing" && ` ${percent(job.progress)}`),
      h("td", { class: "number" }, job.audio_seconds ? clock(job.audio_seconds) : "–"),
      h("td", { class: "when", title: dateAndTime(job.created_at) }, ago(job.created_at)),
      h("td", { class: "number" }, span(ran)),
      h("td", { class: "number" }, job.usage?.estimated_cost > 0 ? dollars(job.usage.estimated_cost) : "–"),
      h("td", { class: "name" }, job.error_code && [h("code", {}, job.error_code), " ", h("span", { class: "muted" }, job.error)]),
    );
  }

  #showChosen(count) {
    byId("chosen").textContent = count ? `${plural(count, "job")} chosen` : "None chosen";
    for (const action of ["cancel", "retry"]) byId(`${action}-chosen`).disabled = !count;
  }

  async #actOnAll(action) {
    if (!await this.load()) return; // what was typed last shall be what is seen
    const filter = this.#shown;
    const said = Object.entries(filter).map(([name, value]) => `${name.replace("_", " ")} ${value}`).join(", ");
    if (!said) return void toast("Say above which jobs: name a status, an owner or an error code.");
    const what = action === "cancel" ? "Jobs that wait or run are cancelled." : "Failed and cancelled jobs are queued again; what they cost is paid again.";
    const title = action === "cancel" ? "Cancel all that match?" : "Retry all that match?";
    if (await confirmed(title, `${what} Matching: ${said}.`, action === "cancel" ? "Cancel them" : "Retry them")) await this.#act(action, null, filter);
  }

  /** Cancel or retry the jobs with these ids or, without, all that match the filter. */
  async #act(action, ids, filter = null) {
    let [changed, refused, said, began] = [0, 0, "", null];
    const send = async (body) => {
      // What has failed again since the first answer is not tried once more.
      if (began && action === "retry") body.ended_before = began;
      const answer = await api("POST", `/operate/jobs/${action}`, { body });
      began ??= answer.at;
      changed += answer.changed;
      refused += answer.refused;
      return answer.more && answer.changed > 0;
    };
    try {
      if (filter) while (await send({ filter }));
      else for (let sent = 0; sent < ids.length; sent += AT_ONCE) await send({ ids: ids.slice(sent, sent + AT_ONCE) });
      const left = ids ? ids.length - changed - refused : 0;
      said = [
        `${plural(changed, "job")} ${DONE[action]}`,
        left > 0 && `${number(left)} could not be, by their status`,
        refused > 0 && `${number(refused)} would be more than their owners may have`,
      ].filter(Boolean).join("; ");
    } catch (error) {
      said = error.message;
    }
    await this.load();
    toast(said);
    this.onChange();
  }
}
