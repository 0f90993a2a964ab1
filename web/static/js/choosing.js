// Choosing among the rows of a table by their boxes, one by one or all that are shown.

import { byId, h } from "./dom.js";

export class Choice {
  #chosen = new Set();

  /** `rows` and `all` are the ids of the table's body and of the box for all; `onChange` hears how many are chosen. */
  constructor(rows, all, onChange) {
    this.rows = byId(rows);
    this.all = byId(all);
    this.onChange = onChange;
    this.all.addEventListener("change", () => {
      const on = this.all.checked;
      for (const box of this.#boxes) this.#choose(box, on);
    });
  }

  /** What is chosen. */
  get ids() {
    return [...this.#chosen];
  }

  get #boxes() {
    return [...this.rows.querySelectorAll("input")];
  }

  /** Return the box of a row. */
  box(id, label) {
    return h("input", { type: "checkbox", value: id, "aria-label": label, onchange: (event) => this.#choose(event.target, event.target.checked) });
  }

  /** Choose none. */
  clear() {
    this.#chosen.clear();
  }

  /** Say how many are chosen of the rows that there are now. */
  show() {
    const count = this.#chosen.size;
    this.all.checked = count > 0 && count === this.#boxes.length;
    this.all.indeterminate = count > 0 && count < this.#boxes.length;
    this.onChange(count);
  }

  #choose(box, on) {
    box.checked = on;
    if (on) this.#chosen.add(box.value);
    else this.#chosen.delete(box.value);
    this.show();
  }
}
