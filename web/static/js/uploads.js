// The card that takes recordings: dropped, chosen or recorded. Each is uploaded, then becomes a job.

import { api } from "./api.js";
import { byId, h } from "./dom.js";
import { bytes, clock, percent } from "./format.js";
import { canRecord, Recording } from "./recorder.js";
import { toast } from "./toasts.js";
import { forgetUploads, upload } from "./upload.js";

const AT_ONCE = 3;
const OPTIONS = "pgscribe.options";
const HOPELESS = new Set([400, 413, 422, "unreadable", "empty"]); // with these options and this file

export class Uploads {
  #waiting = [];
  #running = 0;

  /** `onJob` gets each new job's row. */
  constructor(onJob) {
    this.onJob = onJob;
    this.form = byId("options");
    forgetUploads();
    document.querySelector("form.account")?.addEventListener("submit", () => forgetUploads({ all: true }));
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
      byId("record").disabled = true; // while the browser asks whether it may
      try {
        this.recording = await Recording.begin();
      } catch (error) {
        return void toast(error.message);
      } finally {
        byId("record").disabled = false;
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
    const { language, model, translate } = this.form.elements;
    const spoken = language.value ? language.selectedOptions[0].text : "language detected";
    const said = [spoken, `${model.value} model`, translate.checked && "into English"];
    byId("options-summary").textContent = said.filter(Boolean).join(", ");
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

  next() {
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
    this.uploaded = null;
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
    const focused = this.buttons.contains(document.activeElement);
    const labels = pairs.filter((_, index) => index % 2 === 0);
    this.buttons.replaceChildren(...labels.map((label, index) => h(
      "button",
      { type: "button", class: "quiet", "aria-label": `${label} ${this.file.name}`, onclick: pairs[index * 2 + 1] },
      label,
    )));
    if (focused) (this.buttons.firstElementChild ?? byId("files")).focus();
  }

  #cancel() {
    this.cancelled = true;
    this.controller?.abort();
    this.#leave();
  }

  #leave() {
    const focused = this.element.contains(document.activeElement);
    const next = this.element.nextElementSibling ?? this.element.previousElementSibling;
    this.element.remove();
    if (focused) (next?.querySelector("button") ?? byId("files")).focus();
  }

  #again() {
    this.problem.hidden = true;
    this.state.textContent = "Waiting";
    this.#offer("Cancel", () => this.#cancel());
    this.uploads.again(this);
  }

  async run() {
    if (this.cancelled) return;
    this.controller = new AbortController();
    try {
      if (!this.file.size) throw new Empty();
      this.uploaded ??= await upload(this.file, {
        signal: this.controller.signal,
        onProgress: (share) => this.#progress(share),
        onTrouble: () => { this.state.textContent = navigator.onLine ? "Interrupted, trying again" : "Waiting for a connection"; },
      });
      await this.#submit();
      this.#leave();
    } catch (error) {
      if (!this.cancelled) this.#stop(error);
    }
  }

  #stop(error) {
    this.state.textContent = "Stopped";
    this.bar.hidden = true;
    this.problem.textContent = inWords(error, this.file);
    this.problem.hidden = false;
    const again = HOPELESS.has(error.status ?? error.code) ? [] : ["Try again", () => this.#again()];
    this.#offer(...again, "Remove", () => this.#cancel());
  }

  #progress(share) {
    this.bar.hidden = false;
    this.bar.value = share;
    this.state.textContent = `${percent(share)} of ${bytes(this.file.size)}`;
  }

  // The key makes it one job, however often it is sent.
  async #submit() {
    this.state.textContent = "Queueing";
    this.#offer();
    const body = { filePath: this.uploaded.filePath, options: this.options };
    const { jobId } = await api("POST", "/process", { body, headers: { "Idempotency-Key": this.key } });
    this.uploaded.done();
    this.uploads.onJob(await api("GET", `/jobs/${jobId}`));
  }
}

class Empty extends Error {
  code = "empty";
  message = "This file is empty. Look whether it was saved or copied completely.";
}

// The API's messages name its fields first, which nobody sees here.
function inWords(error, file) {
  if (error.code === "upload_too_large" && file.size > error.limit) {
    return `It has ${bytes(file.size)}, and at most ${bytes(error.limit)} are taken. `
      + "A compressed form, such as MP3 or M4A, is much smaller.";
  }
  const prefix = `${error.field}: `;
  if (!error.field || !error.message.startsWith(prefix)) return error.message;
  const said = error.message.slice(prefix.length);
  return said[0].toUpperCase() + said.slice(1);
}
