// The operator's table of all owners' webhooks: what has failed or waits, and sending it again.

import { api } from "./api.js";
import { Choice } from "./choosing.js";
import { byId, h } from "./dom.js";
import { ago, dateAndTime, hostOf, plural } from "./format.js";
import { toast } from "./toasts.js";

const LEFT = "that waits, or whose endpoint is disabled,";

export class Deliveries {
  #choice = new Choice("deliveries", "choose-deliveries", (count) => this.#showChosen(count));
  #cursor = null;
  #asked = 0;
  #status = byId("delivery-status");

  /** `onChange` is called once some are sent again. */
  constructor(onChange) {
    this.onChange = onChange;
    this.#status.addEventListener("change", () => this.load());
    byId("more-deliveries").addEventListener("click", () => this.load(this.#cursor));
    byId("replay-chosen").addEventListener("click", () => this.#replay(this.#choice.ids));
    this.load();
  }

  /** Show what is in the chosen state or, after `cursor`, more of it. */
  async load(cursor = null) {
    const question = ++this.#asked;
    const query = new URLSearchParams({ status: this.#status.value, limit: 50, ...(cursor && { cursor }) });
    try {
      const page = await api("GET", `/operate/webhooks/deliveries?${query}`);
      if (question !== this.#asked) return;
      if (!cursor) {
        this.#choice.clear();
        byId("deliveries").replaceChildren();
      }
      byId("deliveries").append(...page.deliveries.map((one) => this.#row(one)));
      if (!byId("deliveries").childElementCount) {
        byId("deliveries").append(h("tr", {}, h("td", { colspan: "7", class: "muted" }, "None.")));
      }
      this.#cursor = page.next_cursor;
      byId("more-deliveries").hidden = !page.next_cursor;
      byId("deliveries-problem").hidden = true;
      this.#choice.show();
    } catch (error) {
      if (question !== this.#asked) return;
      byId("deliveries-problem").textContent = error.message;
      byId("deliveries-problem").hidden = false;
    }
  }

  #row(one) {
    const host = hostOf(one.url);
    const label = `Choose ${one.event} to ${host}, ${dateAndTime(one.created_at)}`;
    return h("tr", {},
      h("td", {}, this.#choice.box(one.id, label)),
      h("td", { title: one.id }, one.event),
      h("td", { class: "name", title: one.url ?? "" }, host),
      h("td", { class: "owner", title: one.owner_id }, one.email ?? one.owner_id),
      h("td", { class: "when", title: dateAndTime(one.created_at) }, ago(one.created_at)),
      h("td", {}, one.due_at ? `${plural(one.attempts, "attempt")}, again ${ago(one.due_at)}` : plural(one.attempts, "attempt")),
      h("td", { class: "name" }, one.error_code && [h("code", {}, one.error_code), " ", h("span", { class: "muted" }, one.error)]),
    );
  }

  #showChosen(count) {
    byId("chosen-deliveries").textContent = count ? `${count} chosen` : "None chosen";
    byId("replay-chosen").disabled = !count;
  }

  async #replay(ids) {
    try {
      const { replayed } = await api("POST", "/operate/webhooks/replay", { body: { ids } });
      const left = ids.length - replayed;
      const sent = `${plural(replayed, "webhook")} sent again`;
      toast(left ? `${sent}; ${left} ${LEFT} ${left === 1 ? "was" : "were"} left alone` : sent);
    } catch (error) {
      toast(error.message);
    }
    await this.load();
    this.onChange();
  }
}
