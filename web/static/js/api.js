// Asking the REST API. The session is a cookie that scripts can't read.

const SIGN_IN = "/app/sign-in";

/** What the API refused, and why: `code` is stable, `message` is for people, `field` names what is to blame. */
export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail ?? `The server answered ${status}.`);
    this.status = status;
    this.code = problem.code ?? "unknown";
    this.field = problem.field ?? null;
    this.limit = problem.limit ?? null;
    this.retryAfter = problem.retry_after ?? null;
  }
}

/** Nobody answered: there is no connection, or the server is away. */
export class Unreachable extends Error {
  constructor() {
    super("The server can't be reached. Check your connection and try again.");
    this.code = "unreachable";
  }
}

// Who signs out is on the way to the sign-in page. Its answer may take longer than the streams that it ends,
// which would lead there as if somebody wanted to come back.
let signingOut = false;
document.querySelector("form[action$='/sign-out']")?.addEventListener("submit", () => (signingOut = true));
addEventListener("pageshow", () => (signingOut = false));

function signInAgain() {
  if (signingOut) return;
  const here = location.pathname + location.search;
  location.assign(`${SIGN_IN}?next=${encodeURIComponent(here)}`);
}

/** Ask, and return the answer's JSON, or null if it has none. Throws ApiError and Unreachable. */
export async function api(method, path, options = {}) {
  const response = await ask(method, path, options);
  return response.headers.get("Content-Type")?.includes("json") ? response.json() : null;
}

/** Ask, and return an answer that is no refusal. Throws ApiError and Unreachable. */
export async function ask(method, path, { body, headers = {}, keepalive = false, signal } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      keepalive,
      signal,
      headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable();
  }
  if (response.ok) return response;
  if (response.status === 401) signInAgain();
  throw new ApiError(response.status, await problemOf(response));
}

async function problemOf(response) {
  try {
    return await response.json();
  } catch {
    return {};
  }
}
