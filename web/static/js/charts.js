// Charts as inline SVG: stacked bars over time, each with its figures as text for who points at it or can't see it.

import { h, svg } from "./dom.js";
import { number } from "./format.js";

const [HEIGHT, LEFT, BOTTOM, TOP] = [200, 52, 24, 10];
const LABEL = 64; // pixels that a label below the bars takes
const EVERY = [1, 2, 4, 6, 8, 12, 24, 48];

/**
 * Return a figure with bars. `bars`: [{ label, title, values }], values as many as `series` has names;
 * `unit(value)` writes a value; `whole`: there are no halves of them. `caption` says what it shows. `width`: in pixels of
 * the page, so that text has its size there.
 */
export function barChart({ bars, series, caption, width, unit = (value) => number(value, 1), whole = false }) {
  const highest = niceCeiling(Math.max(...bars.map(total), 0), whole);
  const step = (width - LEFT) / bars.length;
  const scale = (HEIGHT - TOP - BOTTOM) / highest;
  const y = (value) => HEIGHT - BOTTOM - value * scale;
  const every = EVERY.find((one) => one * step >= LABEL) ?? bars.length;
  const picture = svg(
    "svg",
    { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": caption },
    [0, 0.5, 1].map((share) => [
      svg("line", { class: "grid", x1: LEFT, x2: width, y1: y(highest * share), y2: y(highest * share) }),
      svg("text", { x: LEFT - 6, y: y(highest * share) + 4, "text-anchor": "end" }, unit(highest * share)),
    ]),
    bars.map((bar, index) => svg("g", {}, svg("title", {}, bar.title), column(bar, LEFT + index * step, step, y))),
    bars.map((bar, index) => index % every === 0 && (index + 0.5) * step + LABEL / 3 < width - LEFT
      && svg("text", { x: LEFT + (index + 0.5) * step, y: HEIGHT - 6, "text-anchor": "middle" }, bar.label)),
  );
  return h("figure", { class: "stack" }, picture, series.length > 1 && legend(series), asTable(bars, series, caption, unit));
}

const total = (bar) => bar.values.reduce((sum, value) => sum + value, 0);

function column(bar, x, step, y) {
  let below = 0;
  return [
    svg("rect", { x, y: TOP, width: step, height: HEIGHT - TOP - BOTTOM, fill: "transparent" }), // to point at
    ...bar.values.map((value, index) => {
      const rect = value > 0 && svg("rect", {
        class: `series-${index + 1}`, x: x + step * 0.12, width: step * 0.76, rx: Math.min(2, step / 6),
        y: y(below + value), height: Math.max(1, y(below) - y(below + value)),
      });
      below += value;
      return rect;
    }),
  ];
}

function legend(series) {
  return h("ul", { class: "legend", "aria-hidden": "true" }, series.map((name, index) => h("li", { class: `series-${index + 1}` }, name)));
}

function asTable(bars, series, caption, unit) {
  return h("details", {},
    h("summary", { class: "small muted" }, "As a table"),
    h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, h("table", {},
      h("caption", { class: "visually-hidden" }, caption),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Time"), series.map((name) => h("th", { scope: "col", class: "number" }, name)))),
      h("tbody", {}, bars.filter(total).map((bar) => h("tr", {},
        h("th", { scope: "row" }, bar.title.split(":\n")[0]), bar.values.map((value) => h("td", { class: "number" }, unit(value)))))),
    )));
}

/** Return a round number that is at least so much, and so is its half. */
function niceCeiling(value, whole) {
  if (!(value > 0)) return whole ? 2 : 1;
  const power = 10 ** Math.floor(Math.log10(value));
  const steps = whole && power === 1 ? [2, 4, 6, 8, 10] : [1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10];
  return steps.find((step) => step * power >= value * 0.999_999) * power;
}
