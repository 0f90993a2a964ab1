// An owner's log: what was sent, what came back, and sending it again.

import { api } from "./api.js";
import { confirmed } from "./confirming.js";
import { byId, focusOn, h, openDialog, update } from "./dom.js";
import { ago, dateAndTime, hostOf, plural, span } from "./format.js";
import { once } from "./pressing.js";
import { toast } from "./toasts.js";

const STATES = { queued: ["Waiting", ""], sending: ["Being sent", "processing"], delivered: ["Delivered", "completed"], failed: ["Not delivered", "failed"] };
const HOUR = 3_600_000; // milliseconds

export class Deliveries {
  #cursor = null;
  #shown = [];
  #urls = new Map(); // of the endpoints, by their ids
  #paged = false; // older ones were asked for
  #asked = 0;
  #status = byId("delivery-status");
  #endpoint = byId("delivery-endpoint");

  constructor() {
    for (const select of [this.#status, this.#endpoint]) select.addEventListener("change", () => this.#again());
    byId("more-deliveries").addEventListener("click", () => this.#more());
    byId("replay-missed").addEventListener("click", () => once("replay-missed", () => this.#replayMissed()));
  }

  /** Let one choose among these endpoints. */
  name(endpoints) {
    const urls = new Map(endpoints.map(({ id, url }) => [id, url]));
    if ([...this.#urls.keys()].some((id) => !urls.has(id))) this.#paged = false; // its log is gone
    this.#urls = urls;
    const chosen = this.#endpoint.value;
    update(this.#endpoint, [h("option", { value: "" }, "To anywhere"), ...endpoints.map((one) => h("option", { value: one.id }, one.url))]);
    this.#endpoint.value = endpoints.some(({ id }) => id === chosen) ? chosen : "";
    if (this.#endpoint.value !== chosen) this.#paged = false;
  }

  /** Show the newest ones as they are now. Throws what `api` throws. */
  async refresh() {
    const question = ++this.#asked;
    const page = await this.#page(null);
    if (question !== this.#asked) return;
    if (!this.#paged) this.#cursor = page.next_cursor;
    this.#show([...page.deliveries, ...(this.#paged ? this.#after(page.deliveries) : [])]);
  }

  async #again() {
    this.#paged = false;
    await this.#try(() => this.refresh());
  }

  async #more() {
    const question = ++this.#asked;
    await this.#try(async () => {
      const page = await this.#page(this.#cursor);
      if (question !== this.#asked) return;
      this.#paged = true;
      this.#cursor = page.next_cursor;
      this.#show([...this.#shown, ...page.deliveries]);
    });
  }

  /** Return what is shown and older than the newest ones, which stays as it was. */
  #after(newest) {
    const ids = new Set(newest.map(({ id }) => id));
    const end = new Date(newest.at(-1)?.created_at ?? 0);
    return this.#shown.filter((one) => !ids.has(one.id) && new Date(one.created_at) <= end);
  }

  #page(cursor) {
    const query = new URLSearchParams({
      limit: 50,
      ...(this.#status.value && { status: this.#status.value }),
      ...(this.#endpoint.value && { endpoint: this.#endpoint.value }),
      ...(cursor && { cursor }),
    });
    return api("GET", `/webhooks/deliveries?${query}`);
  }

  #show(found) {
    this.#shown = found;
    const none = h("tr", {}, h("td", { colspan: "8", class: "muted" }, "None."));
    update(byId("deliveries"), found.length ? found.map((one) => this.#row(one)) : [none]);
    byId("more-deliveries").hidden = !this.#cursor;
  }

  #row(one) {
    const [label, look] = STATES[one.status];
    const url = this.#urlOf(one);
    const about = `${one.event} of ${dateAndTime(one.created_at)} to ${hostOf(url)}`;
    const job = one.job_id && h("a", { href: `/app/jobs/${one.job_id}` }, "Open");
    const again = one.status === "failed" || one.status === "delivered";
    return h("tr", {},
      h("td", {}, one.event),
      h("td", { class: "name", title: url ?? "" }, hostOf(url)),
      h("td", {}, job),
      h("td", { class: "when", title: dateAndTime(one.created_at) }, ago(one.created_at)),
      h("td", {}, h("span", { class: `status ${look}` }, label)),
      h("td", {}, one.due_at ? `${plural(one.attempts, "time")}, again ${ago(one.due_at)}` : plural(one.attempts, "time")),
      h("td", { class: "name" }, answer(one)),
      h("td", {}, h("span", { class: "actions" },
        h("button", { type: "button", class: "quiet", "aria-label": `Details of ${about}`, "data-key": `details ${one.id}`, onclick: () => once("details", () => this.#try(() => this.#details(one.id))) }, "Details"),
        again && h("button", { type: "button", class: "quiet", "aria-label": `Send again: ${about}`, "data-key": `again ${one.id}`, onclick: () => once(`again ${one.id}`, () => this.#replay(one.id)) }, "Send again"),
      )),
    );
  }

  #urlOf(one) {
    return one.url ?? this.#urls.get(one.endpoint_id);
  }

  async #details(id) {
    const one = await api("GET", `/webhooks/deliveries/${id}`);
    byId("delivery-title").textContent = `${one.event}: ${STATES[one.status][0].toLowerCase()}`;
    const facts = [
      ["Id", one.id],
      ["To", this.#urlOf(one) ?? "an endpoint that is deleted"],
      ["Since", dateAndTime(one.created_at)],
      ["Next request", one.due_at && dateAndTime(one.due_at)],
      ["Error", one.error],
    ];
    byId("delivery-about").replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    const rows = one.log.map((request) => h("tr", {},
      h("td", { class: "number" }, String(request.attempt)),
      h("td", { class: "when" }, dateAndTime(request.started_at)),
      h("td", { class: "number" }, span(request.seconds)),
      h("td", {}, answer(request), request.response_excerpt && h("pre", {}, request.response_excerpt)),
    ));
    byId("requests").replaceChildren(...(rows.length ? rows : [h("tr", {}, h("td", { colspan: "4", class: "muted" }, "None yet."))]));
    byId("payload").textContent = JSON.stringify(one.payload, null, 2);
    openDialog(byId("delivery"));
  }

  async #replay(id) {
    await this.#try(async () => {
      await api("POST", `/webhooks/deliveries/${id}/replay`);
      toast("It is sent again, with the same id.");
      this.#paged = false;
      await this.refresh();
      if (document.activeElement === document.body) focusOn(`details ${id}`); // its own button is gone
    });
  }

  async #replayMissed() {
    const period = byId("missed").selectedOptions[0].textContent;
    const endpoint = this.#endpoint.value || null;
    const where = endpoint ? `to ${this.#endpoint.selectedOptions[0].textContent} ` : "";
    const text = `All that could not be delivered ${where}in the last ${period} is sent once more, up to 1,000.`;
    if (!(await confirmed("Send again?", text, "Send again"))) return;
    await this.#try(async () => {
      const since = new Date(Date.now() - byId("missed").value * HOUR).toISOString();
      const { replayed } = await api("POST", "/webhooks/replay", { body: { since, ...(endpoint && { endpoint }) } });
      toast(replayed ? `${plural(replayed, "webhook")} sent again` : "There is nothing to send again.");
      this.#paged = false;
      await this.refresh();
    });
  }

  /** Do something, and say what went wrong. */
  async #try(act) {
    try {
      await act();
      byId("deliveries-problem").hidden = true;
    } catch (error) {
      byId("deliveries-problem").textContent = error.message;
      byId("deliveries-problem").hidden = false;
    }
  }
}

/** Return what came back of a request: the status, or why there was none. */
function answer({ response_status: status, error_code: code, error }) {
  return [status && `${status} `, code && h("code", {}, code), code && error && " ", error && h("span", { class: "muted" }, error)];
}
