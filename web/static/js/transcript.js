// The transcript: segments, the word that is being spoken, and corrections where a segment is wrong.

import { byId, h, reveal } from "./dom.js";
import { editor } from "./correcting.js";
import { clock } from "./format.js";

const FLAGS = {
  repetition: "repeats itself",
  low_confidence: "unsure",
  no_speech: "perhaps no speech",
};
const UNSPACED = new Set(["ja", "lo", "my", "th", "yue", "zh"]);

const BLOCK = 40; // segments that are laid out together
const [LINE, LINE_HEIGHT, GAP] = [65, 1.97, 0.6]; // characters; rem

export class TranscriptView {
  onChange = () => {};
  onWords = () => {}; // with a segment whose words have become elements; its text is the same
  #lit = null;
  #current = null;
  #doubt = -1;

  constructor(element, transcript, player, { path, translated }) {
    Object.assign(this, { element, transcript, player, path });
    this.separator = UNSPACED.has(transcript.language) && !translated ? "" : " ";
    this.segments = transcript.segments.map((segment, index) => new SegmentView(this, segment, index));
    this.#groupSpeakers();
    element.replaceChildren(...blocks(this.segments));
    element.addEventListener("click", (event) => {
      const word = event.target.closest(".word");
      if (word && getSelection().isCollapsed) player.play(Number(word.dataset.start));
    });
  }

  /** Name speakers where they begin, not at each segment. */
  #groupSpeakers() {
    this.segments.forEach((segment, index) => {
      const before = this.segments[index - 1]?.data.speaker;
      segment.element.classList.toggle("same-speaker", Boolean(before) && segment.data.speaker === before);
    });
  }

  /** Segments have been shown anew. */
  changed() {
    this.#lit = this.#current = null;
    this.#groupSpeakers();
    this.light(this.player.time, false);
    this.onChange();
  }

  get doubtful() {
    return this.segments.filter((segment) => segment.doubtful);
  }

  get speakers() {
    return [...new Set(this.segments.map(({ data }) => data.speaker).filter(Boolean))];
  }

  nextDoubtful() {
    const { doubtful } = this;
    const next = doubtful.find((segment) => segment.index > this.#doubt) ?? doubtful[0];
    if (!next) return;
    this.#doubt = next.index;
    reveal(next.element);
    next.time.focus({ preventScroll: true });
  }

  /** Light the word that is spoken at that time, and keep it in sight while it plays. */
  light(time, playing) {
    const segment = lastBefore(this.segments, time, (one) => one.data.start);
    const word = segment && time < segment.data.end + 0.25 ? lastBefore(segment.words, time, (one) => one.start) : null;
    if (segment !== this.#current) {
      this.#current?.element.classList.remove("current");
      segment?.element.classList.add("current");
      this.#current = segment;
      if (segment && playing && byId("follow").checked && !segment.editing) keepInSight(segment.element);
    }
    if (word?.element !== this.#lit) {
      this.#lit?.classList.remove("lit");
      word?.element.classList.add("lit");
      this.#lit = word?.element ?? null;
    }
  }

  /** Light the word at that time, and begin reading there. */
  goTo(time) {
    this.light(time, false);
    if (this.#current && !isInSight(this.#current.element)) reveal(this.#current.element);
  }

  /** Take in what the server has stored. */
  update(transcript) {
    transcript.segments.forEach((data, index) => {
      const segment = this.segments[index];
      if (segment.editing) segment.data = data; // and its form stays as it is
      else if (JSON.stringify(data) !== JSON.stringify(segment.data)) segment.show(data);
    });
    this.transcript = transcript;
    this.changed();
  }
}

/** Return lists of segments. What is out of sight is not laid out, but for its height, which is guessed. */
function blocks(segments) {
  const found = [];
  for (let first = 0; first < segments.length; first += BLOCK) {
    const some = segments.slice(first, first + BLOCK);
    const block = h("ol", { class: "block", "aria-label": `From ${clock(some[0].data.start)}` }, some.map(({ element }) => element));
    const lines = some.reduce((sum, { data }) => sum + Math.ceil(data.text.length / LINE), 0);
    block.style.containIntrinsicBlockSize = `auto ${lines * LINE_HEIGHT + some.length * GAP}rem`;
    block.addEventListener("contentvisibilityautostatechange", ({ skipped }) => skipped || some.forEach((segment) => segment.comeInSight()));
    found.push(block);
  }
  return found;
}

class SegmentView {
  #words = null;
  #inSight = !("oncontentvisibilityautostatechange" in HTMLElement.prototype);

  constructor(view, data, index) {
    Object.assign(this, { view, index, editing: false });
    this.element = h("li", { class: "segment", "data-segment": index });
    this.show(data);
  }

  get doubtful() {
    return Boolean(this.data.flags?.length) && !this.data.corrected;
  }

  show(data) {
    this.data = data;
    this.editing = false;
    const at = clock(data.start);
    this.time = h("button", { type: "button", class: "at quiet", "aria-label": `Play from ${at}`, onclick: () => this.view.player.play(data.start) }, at);
    this.edit = h("button", { type: "button", class: "edit quiet", "aria-label": `Correct the segment at ${at}`, onclick: () => this.#open() }, "Correct");
    this.said = h("p", { class: "said" });
    const removed = data.corrected && !data.text;
    this.said.textContent = removed ? data.original ?? "" : data.text;
    this.#words = null;
    if (this.#inSight) this.#makeWords();
    this.element.className = `segment${this.doubtful ? " doubtful" : ""}${removed ? " removed" : ""}`;
    this.element.replaceChildren(
      this.time,
      h("div", { class: "text" }, data.speaker && h("span", { class: "speaker" }, data.speaker), this.said, this.#marks(removed)),
      this.edit,
    );
  }

  #marks(removed) {
    const { flags = [], corrected, original } = this.data;
    const marks = [
      ...(this.doubtful ? flags.map((flag) => h("span", { class: "mark" }, FLAGS[flag] ?? flag)) : []),
      corrected && h("span", { class: "mark corrected", title: `Originally: ${original ?? ""}` }, removed ? "left out" : "corrected"),
    ].filter(Boolean);
    return marks.length > 0 && h("span", { class: "marks" }, marks);
  }

  /** The words, each an element: of 40,000 those that somebody sees or hears. */
  get words() {
    if (!this.#words) this.#makeWords();
    return this.#words;
  }

  comeInSight() {
    this.#inSight = true;
    if (!this.#words) this.#makeWords();
  }

  #makeWords() {
    const { data } = this;
    this.#words = [];
    if (data.corrected && !data.text) return;
    this.#words = (data.words ?? guessed(data, this.view.separator)).map((word) => ({
      start: word.start,
      element: h("span", { class: "word", "data-start": word.start }, word.word),
    }));
    // Between words stands what stands there in the text: a space, nothing, or a mark that belongs to no word.
    let reached = 0;
    this.said.textContent = "";
    for (const { element } of this.#words) {
      const word = element.textContent;
      const at = data.text.indexOf(word, reached);
      this.said.append(at < 0 ? this.view.separator : data.text.slice(reached, at), element);
      if (at >= 0) reached = at + word.length;
    }
    this.said.append(data.text.slice(reached));
    this.view.onWords(this);
  }

  #open() {
    this.editing = true;
    this.element.replaceChildren(this.time, editor(this, (transcript) => {
      this.show(this.data);
      if (transcript) this.view.update(transcript);
      else this.view.changed();
      this.edit.focus();
    }));
    this.element.querySelector("textarea").focus();
  }
}

/** Return words whose times are guessed by their length: there are none of the engine's. */
function guessed({ start, end, text }, separator) {
  const words = separator ? text.split(/\s+/).filter(Boolean) : [...text];
  const total = words.reduce((sum, word) => sum + word.length + 1, 0);
  let before = 0;
  return words.map((word) => {
    const at = start + ((end - start) * before) / total;
    before += word.length + 1;
    return { word, start: Math.round(at * 1000) / 1000 };
  });
}

function lastBefore(items, time, startOf) {
  let [low, high] = [0, items.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (startOf(items[middle]) <= time + 0.02) low = middle + 1;
    else high = middle;
  }
  return items[low - 1] ?? null;
}

function isInSight(element) {
  const { top, bottom } = element.getBoundingClientRect();
  const covered = byId("player").getBoundingClientRect().height;
  return top >= 80 && bottom <= innerHeight - covered - 40;
}

function keepInSight(element) {
  const smooth = matchMedia("(prefers-reduced-motion: no-preference)").matches;
  if (!isInSight(element)) element.scrollIntoView({ block: "center", behavior: smooth ? "smooth" : "auto" });
}
