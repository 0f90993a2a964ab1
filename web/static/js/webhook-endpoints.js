// An owner's endpoints: adding, testing, stopping and deleting them, and their secrets.

import { api } from "./api.js";
import { confirmed } from "./confirming.js";
import { byId, h, update } from "./dom.js";
import { ago, dateAndTime } from "./format.js";
import { once } from "./pressing.js";
import { toast } from "./toasts.js";

const DISABLED = {
  owner: "Nothing is sent to it: it was disabled by hand.",
  gone: "Nothing is sent to it: it answered that it is gone (410). Enable it once it is back.",
  failing: "Nothing is sent to it: nothing came through for days. Put it right, enable it, and send again what was missed.",
};

export class Endpoints {
  #form = byId("add");

  /** `onChange` is called once something was changed; `onSecret(secret, of)` with a secret to show. */
  constructor({ onChange, onSecret }) {
    this.onChange = onChange;
    this.onSecret = onSecret;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      once("add", () => this.#add());
    });
  }

  /** Show the endpoints as they are now, and return them. */
  async load() {
    const { endpoints } = await api("GET", "/webhooks/endpoints");
    const none = h("li", { class: "muted" }, "You have none yet.");
    update(byId("endpoints"), endpoints.length ? endpoints.map((one) => this.#item(one)) : [none]);
    byId("endpoints").setAttribute("aria-busy", "false");
    return endpoints;
  }

  #item(one) {
    // Of what takes another's place, the key is the same: it gets its focus.
    const button = (label, act, key = `${label} ${one.id}`) => h("button", { type: "button", class: "quiet", onclick: () => once(key, () => this.#run(act)), "aria-label": `${label} ${one.url}`, "data-key": key }, label);
    const enabling = `enable ${one.id}`;
    return h("li", { class: "job" },
      h("span", { class: "name" }, one.url),
      h("span", { class: "actions" },
        one.disabled_at ? button("Enable", () => this.#enable(one, true), enabling) : button("Send a test", () => this.#test(one)),
        button("New secret", () => this.#rotate(one)),
        one.disabled_at ? null : button("Disable", () => this.#enable(one, false), enabling),
        button("Delete", () => this.#delete(one)),
      ),
      h("span", { class: "about" },
        h("span", { class: one.disabled_at ? "status failed" : "status completed" }, one.disabled_at ? "Disabled" : "Enabled"),
        h("span", {}, one.events.map((event) => event.replace("job.", "")).join(", ")),
        h("span", { title: dateAndTime(one.created_at) }, `since ${dateAndTime(one.created_at)}`),
        one.description && h("span", {}, one.description),
      ),
      one.disabled_at && h("p", { class: "problem", title: ago(one.disabled_at) }, DISABLED[one.disabled_reason]),
    );
  }

  /** Do something, and say what went wrong. */
  async #run(act) {
    try {
      await act();
    } catch (error) {
      toast(error.message);
    }
    this.onChange();
  }

  async #test(one) {
    await api("POST", `/webhooks/endpoints/${one.id}/test`);
    toast("A test is on its way: see below what comes of it.");
  }

  async #enable(one, enabled) {
    await api("PATCH", `/webhooks/endpoints/${one.id}`, { body: { enabled } });
    toast(enabled ? "Enabled. What failed meanwhile is not sent by itself: send it again below." : "Disabled");
  }

  async #rotate(one) {
    const text = `Requests to ${one.url} are signed with it from now on, and for a day with the one before it, too.`;
    if (!(await confirmed("Make a new secret?", text, "Make it"))) return;
    const { secret } = await api("POST", `/webhooks/endpoints/${one.id}/secret`, { body: {} });
    this.onSecret(secret, `It signs the requests to ${one.url}.`);
  }

  async #delete(one) {
    const text = `${one.url} is told nothing any more. Its log goes, too, and what waits for it is not sent.`;
    if (!(await confirmed("Delete this endpoint?", text, "Delete it"))) return;
    await api("DELETE", `/webhooks/endpoints/${one.id}`);
    toast("Deleted");
    byId("endpoints-title").focus();
  }

  async #add() {
    const { url, description } = this.#form.elements;
    const events = new FormData(this.#form).getAll("events");
    try {
      if (!url.value.trim()) throw new Problem("url", "Say where the requests are to go.");
      if (!events.length) throw new Problem("events", "Choose at least one event.");
      const body = { url: url.value.trim(), events, description: description.value.trim() || null };
      const made = await api("POST", "/webhooks/endpoints", { body });
      this.#form.reset();
      this.#complain(null);
      byId("adding").open = false;
      this.onSecret(made.secret, `It signs the requests to ${made.url}.`);
      this.onChange();
    } catch (error) {
      this.#complain(error);
    }
  }

  #complain(error) {
    const { url } = this.#form.elements;
    byId("add-problem").hidden = !error;
    byId("add-problem").textContent = error?.message ?? "";
    url.setAttribute("aria-invalid", String(error?.field === "url"));
    if (error?.field === "url") url.focus();
  }
}

class Problem extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}
