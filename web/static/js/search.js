// Searching one's transcripts, and showing where.

import { api } from "./api.js";
import { h } from "./dom.js";
import { clock } from "./format.js";

const [MATCH, MATCH_END] = ["\u0002", "\u0003"];

/** Return the jobs in whose transcripts `q` is found, newest first, and whether there are more. */
export async function searchTranscripts(q, signal) {
  const found = await api("GET", `/search?${new URLSearchParams({ q })}`, { signal });
  return { results: found.results, next: found.next_cursor };
}

/** Return the places of a result as a list: each leads to where that is said. */
export function hitsOf(result) {
  return h("ul", { class: "hits" }, result.hits.map((hit) =>
    h("li", {}, h(
      "a",
      { href: `/app/jobs/${result.id}${hit.start === null ? "" : `?t=${hit.start}`}` },
      hit.start === null ? null : [h("span", { class: "number" }, clock(hit.start)), " "],
      marked(hit.text),
    )),
  ));
}

function marked(text) {
  return text.split(MATCH).flatMap((part, index) => {
    if (!index) return [part];
    const [match, rest = ""] = part.split(MATCH_END);
    return [h("mark", {}, match), rest];
  });
}
