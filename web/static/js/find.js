// Finding text in the transcript that the page shows. Matches are painted, not written into the text.

import { byId, reveal } from "./dom.js";
import { number } from "./format.js";

export class Find {
  #found = []; // { segment, range }, in order
  #pattern = null;
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
    this.#pattern = q ? patternOf(q) : null;
    this.#found = q ? this.view.segments.flatMap((segment) => this.#in(segment)) : [];
    this.#at = -1;
    this.#paint();
    const count = this.#found.length;
    for (const name of ["previous", "next"]) byId(name).disabled = !count;
    byId("matches").textContent = !q ? "" : count ? `${number(count)} found` : "Not found";
  }

  /** A segment's text stands in other nodes now. */
  renew(segment) {
    if (!this.#pattern) return;
    const fresh = this.#in(segment);
    let next = 0;
    this.#found = this.#found.map((one) => (one.segment === segment ? fresh[next++] : one));
    this.#paint();
  }

  #in(segment) {
    return matches(segment.said, this.#pattern).map((range) => ({ segment, range }));
  }

  #paint() {
    CSS.highlights?.set("found", new Highlight(...this.#found.map(({ range }) => range)));
    if (this.#at < 0) CSS.highlights?.delete("found-now");
    else CSS.highlights?.set("found-now", new Highlight(this.#found[this.#at].range));
  }

  #go(by) {
    const count = this.#found.length;
    if (!count) return;
    this.#at = this.#at < 0 && by < 0 ? count - 1 : (this.#at + by + count) % count;
    this.#found[this.#at].segment.comeInSight();
    this.#paint();
    byId("matches").textContent = `${number(this.#at + 1)} of ${number(count)}`;
    reveal(this.#found[this.#at].range.startContainer.parentElement);
  }
}

/**
 * Return a pattern for what is sought, whatever the case and however its accents are written. Not by comparing in lower
 * case, which may be longer than upper case.
 */
function patternOf(q) {
  const ways = new Set([q, q.normalize("NFC"), q.normalize("NFD")]);
  const escaped = [...ways].map((way) => way.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/\s+/g, "\\s+"));
  return new RegExp(escaped.join("|"), "giu");
}

/** Return the ranges of an element's text that match. */
function matches(element, pattern) {
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
  return [...text.matchAll(pattern)].map((match) => {
    const range = new Range();
    range.setStart(...place(match.index));
    const [node, offset] = place(match.index + match[0].length - 1);
    range.setEnd(node, Math.min(node.length, offset + 1));
    return range;
  });
}
