// Following the server's events. While nobody looks at the page there is no connection: browsers allow few of them
// to one server, and other tabs want theirs.

import { api } from "./api.js";

const HIDDEN_FOR = 20_000; // milliseconds
const AGAIN = 5_000;

/**
 * Follow a stream. `events`: a function for each kind of event, which gets its data; after `end` (unless the
 * session's token has just run out) the stream is over. `onConnection(up)`: whether it is live.
 */
export function follow(path, events, onConnection = () => {}) {
  let source = null;
  let timer = null;
  let over = false;

  function open() {
    clearTimeout(timer);
    if (over || source || document.hidden) return;
    source = new EventSource(path);
    source.onopen = () => onConnection(true);
    source.onerror = () => {
      onConnection(false);
      if (source?.readyState === EventSource.CLOSED) refused();
    };
    for (const [name, react] of Object.entries(events)) source.addEventListener(name, (event) => react(JSON.parse(event.data)));
    source.addEventListener("end", (event) => {
      if (JSON.parse(event.data).reason !== "token_expired") close();
    });
  }

  // EventSource does not say why. Asking does, and leads to the sign-in page if that is it.
  async function refused() {
    drop();
    timer = setTimeout(open, AGAIN);
    await api("GET", "/limits").catch(() => {});
  }

  function drop() {
    source?.close();
    source = null;
    onConnection(false);
  }

  function close() {
    over = true;
    clearTimeout(timer);
    drop();
    document.removeEventListener("visibilitychange", look);
  }

  function look() {
    clearTimeout(timer);
    if (document.hidden) timer = setTimeout(drop, HIDDEN_FOR);
    else open();
  }

  document.addEventListener("visibilitychange", look);
  open();
  return { close };
}
