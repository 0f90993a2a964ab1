// Finding text in the transcript that the page shows. Matches are painted, not written into the text.

import { byId } from "./dom.js";

export class Find {
  #ranges = [];
  #at = -1;

  constructor(view) {
    this.view = view;
    this.form = byId("find");
    this.form.addEventListener("input", () => this.update());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#go(1);
    });
    byId("previous").addEventListener("click", () => this.#go(-1));
    this.form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      this.form.reset();
      this.update();
    });
  }

  /** Look again: for something else, or because the text has changed. */
  update() {
    const q = this.form.elements.q.value.trim();
    this.#ranges = q ? this.view.segments.flatMap((segment) => matches(segment.said, q)) : [];
    this.#at = -1;
    CSS.highlights?.set("found", new Highlight(...this.#ranges));
    CSS.highlights?.delete("found-now");
    for (const name of ["previous", "next"]) byId(name).disabled = !this.#ranges.length;
    byId("matches").textContent = !q ? "" : this.#ranges.length ? `${this.#ranges.length} found` : "Not found";
  }

  #go(by) {
    const count = this.#ranges.length;
    if (!count) return;
    this.#at = this.#at < 0 && by < 0 ? count - 1 : (this.#at + by + count) % count;
    const range = this.#ranges[this.#at];
    CSS.highlights?.set("found-now", new Highlight(range));
    byId("matches").textContent = `${this.#at + 1} of ${count}`;
    range.startContainer.parentElement.scrollIntoView({ block: "center" });
  }
}

/** Return the ranges of an element's text that are `q`, whatever the case. */
function matches(element, q) {
  const nodes = [];
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  let text = "";
  while (walker.nextNode()) {
    nodes.push({ node: walker.currentNode, at: text.length });
    text += walker.currentNode.data;
  }
  const place = (offset) => {
    const found = nodes.findLast(({ at }) => at <= offset);
    return [found.node, offset - found.at];
  };
  // By a pattern, as lower case may be longer than upper case.
  const pattern = new RegExp(q.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/\s+/g, "\\s+"), "giu");
  return [...text.matchAll(pattern)].map((match) => {
    const range = new Range();
    range.setStart(...place(match.index));
    const [node, offset] = place(match.index + match[0].length - 1);
    range.setEnd(node, Math.min(node.length, offset + 1));
    return range;
  });
}
