// The form that a segment becomes while it is corrected.

import { api } from "./api.js";
import { h } from "./dom.js";
import { clock } from "./format.js";

const FIELDS = { text: "Text", speaker: "Speaker" };
const AT_ONCE = 5000; // corrections in one request, as the API allows

/**
 * Return the form for a segment. `done(transcript)` is called at its end: with the transcript as it is then, or with
 * null if nothing was changed.
 */
export function editor(segment, done) {
  const { view } = segment;
  const data = segment.data; // as the form was opened; `segment.data` may be newer
  const id = `correct-${segment.index}`;
  const text = h("textarea", { id: `${id}-text`, rows: "3" });
  text.value = data.text;
  const speaker = h("input", { id: `${id}-speaker`, maxlength: "100", list: `${id}-speakers`, autocomplete: "off", value: data.speaker ?? "" });
  const scope = h("select", {},
    h("option", { value: "one" }, "this segment"),
    h("option", { value: "following" }, "this one and those that follow without a speaker"),
    data.speaker && h("option", { value: "all" }, `all of ${data.speaker}’s segments`),
  );
  if (data.speaker) scope.value = "all";
  const problem = h("p", { class: "error", role: "alert", hidden: true });
  const save = h("button", { class: "primary" }, "Save");
  const form = h(
    "form",
    { class: "stack", "aria-label": `Correct the segment at ${clock(data.start)}`, onsubmit: submit, onkeydown: keys },
    h("label", { class: "field" }, "Text", text, h("small", {}, "Leave it empty to take the segment out of exports.")),
    h("div", { class: "fields" },
      h("label", { class: "field" }, "Speaker", speaker, h("datalist", { id: `${id}-speakers` }, view.speakers.map((name) => h("option", { value: name })))),
      h("label", { class: "field" }, "Name the speaker of", scope),
    ),
    problem,
    h("div", { class: "row" },
      save,
      h("button", { type: "button", onclick: () => done(null) }, "Cancel"),
      data.corrected && h("button", { type: "button", class: "quiet", onclick: () => send([{ segment: segment.index, text: null }]) }, "Back to the original text"),
    ),
  );

  function keys(event) {
    if (event.isComposing) return;
    const changed = text.value !== data.text || speaker.value !== (data.speaker ?? "");
    if (event.key === "Escape" && !changed) done(null); // what was typed goes by "Cancel" only
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  }

  function submit(event) {
    event.preventDefault();
    const changes = new Map();
    const change = (index, values) => changes.set(index, { segment: index, ...changes.get(index), ...values });
    const said = text.value.trim();
    if (said !== data.text) change(segment.index, { text: said === segment.data.original ? null : said });
    const name = speaker.value.trim() || null;
    if (name !== (data.speaker ?? null)) for (const index of named()) change(index, { speaker: name });
    if (changes.size) send([...changes.values()]);
    else done(null);
  }

  /** Return the segments that the speaker's name is for. */
  function named() {
    if (scope.value === "all") return view.segments.filter((one) => one.data.speaker === data.speaker).map((one) => one.index);
    const found = [segment.index];
    if (scope.value === "following") {
      for (const next of view.segments.slice(segment.index + 1)) {
        if (next.data.speaker) break;
        found.push(next.index);
      }
    }
    return found;
  }

  async function send(corrections) {
    save.disabled = true;
    problem.hidden = true;
    try {
      for (let sent = 0; sent < corrections.length; sent += AT_ONCE) {
        await api("PATCH", `${view.path}/corrections`, { body: { corrections: corrections.slice(sent, sent + AT_ONCE) } });
      }
      done(await api("GET", `${view.path}/transcript.json`));
    } catch (error) {
      problem.textContent = error.message.replace(/^corrections\[\d+\]\.(\w+): /, (_, field) => `${FIELDS[field] ?? field}: `);
      problem.hidden = false;
      save.disabled = false;
    }
  }

  return form;
}
