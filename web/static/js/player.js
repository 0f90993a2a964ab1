// The player: controls, keyboard, and a waveform to see where one is and to go elsewhere.

import { byId, h, icon, svg } from "./dom.js";
import { clock } from "./format.js";

const STEP = 5; // seconds
const BARS = 400;
const TYPING = 'input:not([type="checkbox"]), textarea, select, dialog';
const PRESSED = "input, button, a, summary"; // by the space bar
const PLACES = "#player, #segments"; // take the focus when they are clicked

export class Player {
  onTime = () => {};
  #audio = byId("audio");
  #slider = byId("waveform");

  #said = null;
  #width = 0;
  #shown = null;

  /** `peaks`: 0 to 255, of equal parts of the recording. */
  constructor({ source, duration, peaks }) {
    this.duration = duration;
    this.#audio.src = source;
    this.#draw(peaks);
    this.#controls();
    this.#waveform();
    this.#keys();
    byId("duration").textContent = clock(duration);
    this.#slider.setAttribute("aria-valuemax", Math.round(duration));
    this.#update();
  }

  get time() {
    return this.#audio.currentTime;
  }

  /** Mark parts of the recording, [start, end] in seconds, of whose text there is doubt. */
  mark(doubts) {
    this.doubts.replaceChildren(...doubts.map(([start, end]) => svg("rect", {
      x: (start / this.duration) * BARS, width: Math.max(1, ((end - start) / this.duration) * BARS), y: 96, height: 4,
    })));
  }

  seek(seconds) {
    const time = Math.min(Math.max(0, seconds), Math.max(0, this.duration - 0.05));
    this.#audio.currentTime = time;
    // Safari forgets it where nothing of the recording is there yet.
    if (!this.#audio.readyState) this.#audio.addEventListener("loadedmetadata", () => { this.#audio.currentTime = time; }, { once: true });
    this.#update();
  }

  play(from = null) {
    if (from !== null) this.seek(from);
    this.#audio.play().catch(() => {}); // what is wrong, the event `error` says
  }

  toggle() {
    if (this.#audio.paused) this.play();
    else this.#audio.pause();
  }

  #controls() {
    byId("back").append(icon("back"));
    byId("forward").append(icon("forward"));
    byId("back").addEventListener("click", () => this.seek(this.time - STEP));
    byId("forward").addEventListener("click", () => this.seek(this.time + STEP));
    byId("play").addEventListener("click", () => this.toggle());
    byId("speed").addEventListener("change", (event) => { this.#audio.playbackRate = Number(event.target.value); });
    for (const name of ["play", "pause", "ended"]) this.#audio.addEventListener(name, () => this.#showState());
    this.#audio.addEventListener("seeked", () => this.#update());
    this.#audio.addEventListener("error", () => {
      byId("audio-problem").textContent = "The recording can't be played: it is no longer in storage, or the browser doesn't know its form.";
      byId("audio-problem").hidden = false;
    });
    this.#showState();
  }

  #showState() {
    const playing = !this.#audio.paused;
    byId("play").replaceChildren(icon(playing ? "pause" : "play"));
    byId("play").setAttribute("aria-label", playing ? "Pause" : "Play");
    this.#update();
    if (playing) requestAnimationFrame(() => this.#frame());
  }

  // An audio element tells the time four times a second; words are shorter than that.
  #frame() {
    this.#update();
    if (!this.#audio.paused) requestAnimationFrame(() => this.#frame());
  }

  #update() {
    const { time } = this;
    const share = this.duration ? Math.min(1, time / this.duration) : 0;
    const said = clock(time);
    if (said !== this.#said) { // not in each frame
      this.#said = said;
      byId("position").textContent = said;
      this.#slider.setAttribute("aria-valuenow", Math.floor(time));
      this.#slider.setAttribute("aria-valuetext", `${said} of ${clock(this.duration)}`);
    }
    const pixels = Math.round(share * this.#width * devicePixelRatio) / devicePixelRatio;
    if (pixels !== this.#shown) {
      this.#shown = pixels;
      this.#move(pixels);
    }
    this.onTime(time, !this.#audio.paused);
  }

  // The waveform: only transforms change, so that nothing is laid out or painted while it plays.

  #move(pixels) {
    this.head.style.transform = `translateX(${pixels}px)`;
    this.played.style.transform = `translateX(${pixels - this.#width}px)`;
    this.played.firstChild.style.transform = `translateX(${this.#width - pixels}px)`;
  }

  #draw(peaks) {
    const shape = outline(peaks);
    const picture = (name, ...children) => svg(
      "svg", { viewBox: `0 0 ${BARS} 100`, preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("path", { class: name, d: shape }), children,
    );
    this.doubts = svg("g", { class: "doubts" });
    this.played = h("div", { class: "played" }, picture("done"));
    this.head = h("div", { class: "head" });
    this.#slider.replaceChildren(picture("bars", this.doubts), h("div", { class: "clip" }, this.played, this.head));
    new ResizeObserver(([{ contentRect }]) => {
      this.#width = contentRect.width;
      this.#shown = null;
      this.#update();
    }).observe(this.#slider);
  }

  #waveform() {
    const go = (event) => {
      const box = this.#slider.getBoundingClientRect();
      this.seek(((event.clientX - box.left) / box.width) * this.duration);
    };
    this.#slider.addEventListener("pointerdown", (event) => {
      this.#slider.setPointerCapture(event.pointerId);
      go(event);
    });
    this.#slider.addEventListener("pointermove", (event) => event.buttons && go(event));
    this.#slider.addEventListener("keydown", (event) => {
      const to = {
        ArrowLeft: this.time - STEP, ArrowDown: this.time - STEP, ArrowRight: this.time + STEP, ArrowUp: this.time + STEP,
        PageDown: this.time - 60, PageUp: this.time + 60, Home: 0, End: this.duration,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.seek(to);
    });
  }

  #keys() {
    addEventListener("keydown", (event) => {
      const { key, target } = event;
      if (event.ctrlKey || event.metaKey || event.altKey || target.closest(TYPING)) return;
      if (key === " " && target.closest(PRESSED)) return;
      const act = {
        " ": () => this.toggle(), k: () => this.toggle(),
        j: () => this.seek(this.time - STEP), l: () => this.seek(this.time + STEP),
      }[key];
      // Letters only where one plays or reads: whoever speaks to the browser says them anywhere (WCAG 2.1.4).
      if (!act || (key !== " " && !target.closest(PLACES))) return;
      event.preventDefault();
      act();
    });
  }
}

/** Return a path of thin bars, the loudest of which has the full height. */
function outline(peaks) {
  if (!peaks.length) return `M0 49h${BARS}v2H0z`;
  const loudest = Math.max(...peaks, 1);
  const count = Math.min(BARS, peaks.length);
  return Array.from({ length: count }, (_, bar) => {
    const part = peaks.slice(Math.floor((bar * peaks.length) / count), Math.floor(((bar + 1) * peaks.length) / count));
    const height = Math.max(2, (Math.max(...part) / loudest) * 90);
    const width = BARS / count;
    return `M${(bar * width).toFixed(2)} ${(50 - height / 2).toFixed(1)}h${(width * 0.7).toFixed(2)}v${height.toFixed(1)}h${(-width * 0.7).toFixed(2)}z`;
  }).join("");
}
