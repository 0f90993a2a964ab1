// An owner's endpoints: adding, testing, stopping and deleting them, and their secrets.

import { api } from "./api.js";
import { confirmed } from "./confirming.js";
import { byId, h, update } from "./dom.js";
import { ago, dateAndTime } from "./format.js";
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
      this.#add();
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
    const named = (label) => ({ "aria-label": `${label} ${one.url}`, "data-key": `${label} ${one.id}` });
    const button = (label, act, attributes = {}) => h("button", { type: "button", class: "quiet", onclick: (event) => this.#run(event.currentTarget, act), ...named(label), ...attributes }, label);
    return h("li", { class: "job" },
      h("span", { class: "name" }, one.url),
      h("span", { class: "actions" },
        one.disabled_at ? button("Enable", () => this.#enable(one, true)) : button("Send a test", () => this.#test(one)),
        button("New secret", () => this.#rotate(one)),
        one.disabled_at ? null : button("Disable", () => this.#enable(one, false)),
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

  /** Do something that one press of a button asks for once. */
  async #run(button, act) {
    button.disabled = true;
    try {
      await act();
    } catch (error) {
      toast(error.message);
    }
    button.disabled = false;
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
    const button = this.#form.querySelector("button");
    button.disabled = true;
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
    button.disabled = false;
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
