// Making elements. Text is always text: nothing here reads HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element. Attributes that are false or null are left out; functions are listeners of `on…`. */
export function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** As `h`, for what stands in an <svg>. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.setAttribute("class", value);
    else if (key in element && !key.includes("-") && !(element instanceof SVGElement) && typeof value !== "string") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const ICONS = {
  play: "M7 4.5v15l12-7.5z",
  pause: "M8 5v14M16 5v14",
  back: "M11 6 5 12l6 6M19 6l-6 6 6 6",
  forward: "m13 6 6 6-6 6M5 6l6 6-6 6",
  up: "m6 15 6-6 6 6",
  down: "m6 9 6 6 6-6",
  microphone: "M12 3a3 3 0 0 0-3 3v5a3 3 0 0 0 6 0V6a3 3 0 0 0-3-3zM5 11a7 7 0 0 0 14 0M12 18v3",
  stop: "M7 7h10v10H7z",
};

/** Return an icon that says nothing to screen readers: the control it stands in has a name. */
export function icon(name) {
  return svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/**
 * Make these the element's children. Those that are the same as before stay, with what is selected in them; one that
 * somebody presses is left for the next time. What has the focus and a `data-key` gets it back.
 */
export function update(element, children) {
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  children.forEach((child, index) => {
    const before = element.children[index];
    if (!before) element.append(child);
    else if (!before.isEqualNode(child) && !before.querySelector(":active")) before.replaceWith(child);
  });
  while (element.childElementCount > children.length) element.lastElementChild.remove();
  if (focused && !element.contains(document.activeElement)) focusOn(focused, element);
}

/** Give the focus to what has that `data-key`, if it is there. */
export function focusOn(key, element = document.body) {
  [...element.querySelectorAll("[data-key]")].find(({ dataset }) => dataset.key === key)?.focus();
}

/** Show a dialog. What had the focus gets it back once it is closed, though it may have been made anew meanwhile. */
export function openDialog(dialog) {
  const { key } = document.activeElement.dataset;
  dialog.showModal();
  dialog.addEventListener("close", () => {
    const focused = document.activeElement;
    if (key && (focused === document.body || dialog.contains(focused))) focusOn(key);
  }, { once: true });
}

/**
 * Scroll to an element's middle. What has not been in sight yet has its height guessed, and takes the real one as soon
 * as it is: so look again in the next frames.
 */
export function reveal(element, frames = 4) {
  element.scrollIntoView({ block: "center" });
  if (frames) requestAnimationFrame(() => reveal(element, frames - 1));
}

/** Return the element with that id, which the page's template has. */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`The page has no #${id}`);
  return found;
}
