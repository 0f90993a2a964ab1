// Short messages at the bottom of the page, which screen readers read out.

import { byId, h } from "./dom.js";

/**
 * Show a message for some seconds. With an action (`{ label, run }`) it has a button. Returns a function that takes
 * it away; `onGone` is called once it has gone without the action. While it is pointed at or has the focus it stays;
 * `focused` gives that to its button.
 */
export function toast(text, { action = null, seconds = 6, focused = false, onGone = () => {} } = {}) {
  let timer;
  const remove = () => {
    clearTimeout(timer);
    element.remove();
  };
  const expire = () => {
    if (!element.isConnected) return;
    remove();
    onGone();
  };
  const start = () => {
    clearTimeout(timer);
    timer = setTimeout(expire, seconds * 1000);
  };
  const stop = () => clearTimeout(timer);
  const button = action && h("button", { type: "button", onclick: () => { remove(); action.run(); } }, action.label);
  const element = h(
    "div",
    { class: "toast", onmouseenter: stop, onmouseleave: start, onfocusin: stop, onfocusout: start },
    h("span", {}, text),
    button,
  );
  byId("toasts").append(element);
  start();
  if (focused) button?.focus();
  return { remove, expire };
}
