// The card that takes recordings: dropped, chosen or recorded. Each is uploaded, then becomes a job.

import { api } from "./api.js";
import { byId, h } from "./dom.js";
import { bytes, clock, percent } from "./format.js";
import { canRecord, Recording } from "./recorder.js";
import { toast } from "./toasts.js";
import { forgetExpired, upload } from "./upload.js";

const AT_ONCE = 3;
const OPTIONS = "pgscribe.options";

export class Uploads {
  #waiting = [];
  #running = 0;

  /** `onJob` gets each new job's row. */
  constructor(onJob) {
    this.onJob = onJob;
    this.form = byId("options");
    forgetExpired();
    this.#restoreOptions();
    this.#takeFiles();
    this.#takeRecordings();
    addEventListener("beforeunload", (event) => {
      if (this.#running || this.recording) event.preventDefault();
    });
  }

  #takeFiles() {
    const input = byId("files");
    const drop = byId("drop");
    input.addEventListener("change", () => {
      this.add(input.files);
      input.value = "";
    });
    const over = (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      drop.classList.toggle("over", event.type === "dragover");
    };
    addEventListener("dragover", over);
    addEventListener("dragleave", over);
    addEventListener("drop", (event) => {
      over(event);
      this.add(event.dataTransfer?.files ?? []);
    });
  }

  #takeRecordings() {
    byId("record").hidden = !canRecord;
    byId("record").addEventListener("click", async () => {
      try {
        this.recording = await Recording.begin();
      } catch (error) {
        return void toast(error.message);
      }
      this.#showRecording();
    });
    byId("finish-recording").addEventListener("click", async () => {
      const recording = this.#endRecording();
      this.add([await recording.finish()]);
    });
    byId("discard-recording").addEventListener("click", () => this.#endRecording().discard());
  }

  #showRecording() {
    byId("record").hidden = true;
    byId("recording").hidden = false;
    byId("finish-recording").focus();
    this.clock = setInterval(() => {
      byId("recorded").textContent = clock((Date.now() - this.recording.startedAt) / 1000);
      byId("level").value = this.recording.level();
    }, 100);
  }

  #endRecording() {
    const { recording } = this;
    this.recording = null;
    clearInterval(this.clock);
    byId("recording").hidden = true;
    byId("record").hidden = false;
    byId("record").focus();
    return recording;
  }

  // Options

  /** Return the options as the API takes them: only what differs from the defaults. */
  get options() {
    const fields = this.form.elements;
    const options = { model: fields.model.value };
    if (fields.language.value) options.language = fields.language.value;
    if (fields.initial_prompt.value.trim()) options.initial_prompt = fields.initial_prompt.value.trim();
    if (fields.word_timestamps.checked) options.word_timestamps = true;
    if (fields.translate.checked) options.task = "translate";
    if (fields.preprocessing.checked) options.preprocessing = true;
    return options;
  }

  #restoreOptions() {
    try {
      for (const [name, value] of Object.entries(JSON.parse(localStorage.getItem(OPTIONS)) ?? {})) {
        const field = this.form.elements[name];
        if (field?.type === "checkbox") field.checked = value;
        else if (field) field.value = value;
      }
    } catch {
      // nothing usable is kept
    }
    if (this.form.elements.model.selectedIndex < 0) this.form.elements.model.value = "base";
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("change", () => this.#keepOptions());
    this.#sayOptions();
  }

  #keepOptions() {
    const values = [...this.form.elements].filter((field) => field.name && field.name !== "initial_prompt")
      .map((field) => [field.name, field.type === "checkbox" ? field.checked : field.value]);
    try {
      localStorage.setItem(OPTIONS, JSON.stringify(Object.fromEntries(values)));
    } catch {
      // not allowed: then they are as before next time
    }
    this.#sayOptions();
  }

  #sayOptions() {
    const { language, model } = this.form.elements;
    const spoken = language.value ? language.selectedOptions[0].text : "language detected";
    byId("options-summary").textContent = `${spoken}, ${model.value} model`;
  }

  // Uploads

  add(files) {
    for (const file of files) this.#waiting.push(new Upload(file, this.options, this));
    this.next();
  }

  again(one) {
    this.#waiting.push(one);
    this.next();
  }

  async next() {
    while (this.#running < AT_ONCE && this.#waiting.length) {
      const one = this.#waiting.shift();
      this.#running += 1;
      one.run().finally(() => {
        this.#running -= 1;
        this.next();
      });
    }
  }
}

class Upload {
  constructor(file, options, uploads) {
    Object.assign(this, { file, options, uploads, key: crypto.getRandomValues(new Uint32Array(4)).join("-") });
    this.filePath = null;
    this.state = h("span", { class: "muted small number" }, "Waiting");
    this.bar = h("progress", { max: 1, value: 0, "aria-label": `Upload of ${file.name}` });
    this.problem = h("p", { class: "problem small", role: "alert", hidden: true });
    this.buttons = h("span", { class: "row" });
    this.element = h(
      "li", { class: "upload" },
      h("span", {}, h("strong", {}, file.name), " ", this.state), this.buttons, this.bar, this.problem,
    );
    byId("uploads").append(this.element);
    this.#offer("Cancel", () => this.#cancel());
  }

  #offer(...pairs) {
    const labels = pairs.filter((_, index) => index % 2 === 0);
    this.buttons.replaceChildren(...labels.map((label, index) => h(
      "button",
      { type: "button", class: "quiet", "aria-label": `${label} ${this.file.name}`, onclick: pairs[index * 2 + 1] },
      label,
    )));
  }

  #cancel() {
    this.cancelled = true;
    this.controller?.abort();
    this.element.remove();
  }

  async run() {
    if (this.cancelled) return;
    this.controller = new AbortController();
    this.problem.hidden = true;
    this.#offer("Cancel", () => this.#cancel());
    try {
      this.filePath ??= await upload(this.file, { signal: this.controller.signal, onProgress: (share) => this.#progress(share) });
      await this.#submit();
      this.element.remove();
    } catch (error) {
      if (this.cancelled) return;
      this.state.textContent = "Stopped";
      this.problem.textContent = error.message;
      this.problem.hidden = false;
      this.#offer("Try again", () => this.uploads.again(this), "Remove", () => this.#cancel());
    }
  }

  #progress(share) {
    this.bar.value = share;
    this.state.textContent = `${percent(share)} of ${bytes(this.file.size)}`;
  }

  // The key makes it one job, however often it is sent.
  async #submit() {
    this.state.textContent = "Queueing";
    const body = { filePath: this.filePath, options: this.options };
    const { jobId } = await api("POST", "/process", { body, headers: { "Idempotency-Key": this.key } });
    this.uploads.onJob(await api("GET", `/jobs/${jobId}`));
  }
}
