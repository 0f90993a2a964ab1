// Recording from the microphone, in whatever form the browser encodes.

const FORMS = ["audio/webm;codecs=opus", "audio/mp4", "audio/ogg;codecs=opus"];
const EXTENSIONS = { "audio/webm": "webm", "audio/mp4": "m4a", "audio/ogg": "ogg" };

export const canRecord = Boolean(navigator.mediaDevices?.getUserMedia && globalThis.MediaRecorder);

/** A recording that has begun. `level()` is how loud it is at the moment, 0 to 1. */
export class Recording {
  #parts = [];
  #recorder;
  #stream;
  #context;
  #analyser;

  /** Ask for the microphone and begin. Throws an Error whose message says what to do. */
  static async begin() {
    const recording = new Recording();
    try {
      recording.#stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      throw new Error(error.name === "NotAllowedError"
        ? "The browser may not use the microphone. Allow it for this site in the address bar, then try again."
        : "No microphone was found. Plug one in, then try again.");
    }
    try {
      recording.#begin();
    } catch {
      for (const track of recording.#stream.getTracks()) track.stop();
      throw new Error("This browser can't record. Record with another program and drop the file here.");
    }
    return recording;
  }

  #begin() {
    const mimeType = FORMS.find((form) => MediaRecorder.isTypeSupported(form));
    this.#recorder = new MediaRecorder(this.#stream, mimeType ? { mimeType } : {});
    this.#recorder.ondataavailable = (event) => this.#parts.push(event.data);
    this.#recorder.start(1000);
    this.startedAt = new Date();
    this.#context = new AudioContext();
    this.#analyser = this.#context.createAnalyser();
    this.#context.createMediaStreamSource(this.#stream).connect(this.#analyser);
  }

  level() {
    const samples = new Float32Array(this.#analyser.fftSize);
    this.#analyser.getFloatTimeDomainData(samples);
    return Math.min(1, Math.max(...samples.map(Math.abs)) * 1.5);
  }

  /** End it and return the file. */
  async finish() {
    if (this.#recorder.state !== "inactive") { // as it is once the microphone is unplugged
      const stopped = new Promise((resolve) => { this.#recorder.onstop = resolve; });
      this.#recorder.stop();
      await stopped;
    }
    this.discard();
    const type = this.#recorder.mimeType.split(";")[0];
    const at = new Date(this.startedAt - this.startedAt.getTimezoneOffset() * 60_000).toISOString();
    const name = `Recording ${at.slice(0, 10)} ${at.slice(11, 19).replaceAll(":", ".")}.${EXTENSIONS[type] ?? "webm"}`;
    return new File(this.#parts, name, { type });
  }

  discard() {
    if (this.#recorder.state !== "inactive") this.#recorder.stop();
    for (const track of this.#stream.getTracks()) track.stop();
    if (this.#context.state !== "closed") this.#context.close();
  }
}
