// The transcript: segments, the word that is being spoken, and corrections where a segment is wrong.

import { byId, h } from "./dom.js";
import { editor } from "./correcting.js";
import { clock } from "./format.js";

const FLAGS = {
  repetition: "repeats itself",
  low_confidence: "unsure",
  no_speech: "perhaps no speech",
};
const UNSPACED = new Set(["ja", "lo", "my", "th", "yue", "zh"]);

export class TranscriptView {
  onChange = () => {};
  #lit = null;
  #current = null;

  constructor(element, transcript, player, { path, translated }) {
    Object.assign(this, { element, transcript, player, path });
    this.separator = UNSPACED.has(transcript.language) && !translated ? "" : " ";
    this.segments = transcript.segments.map((segment, index) => new SegmentView(this, segment, index));
    element.replaceChildren(...this.segments.map((segment) => segment.element));
    element.addEventListener("click", (event) => {
      const word = event.target.closest(".word");
      if (word && getSelection().isCollapsed) player.play(Number(word.dataset.start));
    });
  }

  get doubtful() {
    return this.segments.filter((segment) => segment.doubtful);
  }

  get speakers() {
    return [...new Set(this.segments.map(({ data }) => data.speaker).filter(Boolean))];
  }

  nextDoubtful() {
    const after = this.segments.findIndex((segment) => segment.element.contains(document.activeElement));
    const { doubtful } = this;
    const next = doubtful.find((segment) => segment.index > after) ?? doubtful[0];
    next?.element.scrollIntoView({ block: "center" });
    next?.time.focus();
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

  /** Take in what the server has stored. */
  update(transcript) {
    this.#lit = this.#current = null;
    transcript.segments.forEach((data, index) => {
      if (JSON.stringify(data) !== JSON.stringify(this.segments[index].data)) this.segments[index].show(data);
    });
    this.transcript = transcript;
    this.light(this.player.time, false);
    this.onChange();
  }
}

class SegmentView {
  constructor(view, data, index) {
    Object.assign(this, { view, index, words: [], editing: false });
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
    this.#fillWords();
    const removed = data.corrected && !data.text;
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

  #fillWords() {
    const { data } = this;
    if (data.corrected && !data.text) {
      this.words = [];
      this.said.textContent = data.original ?? "";
      return;
    }
    this.words = (data.words ?? guessed(data, this.view.separator)).map((word) => ({
      start: word.start,
      element: h("span", { class: "word", "data-start": word.start }, word.word),
    }));
    // Between words stands what stands there in the text: a space, nothing, or a mark that belongs to no word.
    let reached = 0;
    for (const { element } of this.words) {
      const word = element.textContent;
      const at = data.text.indexOf(word, reached);
      this.said.append(at < 0 ? this.view.separator : data.text.slice(reached, at), element);
      if (at >= 0) reached = at + word.length;
    }
    this.said.append(data.text.slice(reached));
  }

  #open() {
    this.editing = true;
    this.element.replaceChildren(this.time, editor(this, (transcript) => {
      this.editing = false;
      if (transcript) this.view.update(transcript);
      if (!this.edit.isConnected) this.show(this.data);
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

function keepInSight(element) {
  const { top, bottom } = element.getBoundingClientRect();
  const covered = byId("player").getBoundingClientRect().height;
  const smooth = matchMedia("(prefers-reduced-motion: no-preference)").matches;
  if (top < 80 || bottom > innerHeight - covered - 40) element.scrollIntoView({ block: "center", behavior: smooth ? "smooth" : "auto" });
}
