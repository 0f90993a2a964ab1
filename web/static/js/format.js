// Numbers and times as people read them.

const RELATIVE = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
const UNITS = [["year", 31_536_000], ["month", 2_592_000], ["day", 86_400], ["hour", 3600], ["minute", 60]];

/** Return seconds as a clock shows them: 1:05, 1:02:03. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/** Return how long something takes, roughly: 12 s, 3 min, 1.5 h, 2 d. */
export function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds > 0 && seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds > 0 && seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${number(seconds / 3600, 1)} h`;
  return `${number(seconds / 86_400, 1)} d`;
}

/** Return when something was or will be: 3 minutes ago, in 2 hours. */
export function ago(date, now = Date.now()) {
  const seconds = (new Date(date) - now) / 1000;
  const [unit, size] = UNITS.find(([, size]) => Math.abs(seconds) >= size) ?? ["second", 1];
  return unit === "second" && Math.abs(seconds) < 45 ? (seconds > 5 ? "in a moment" : "just now")
    : RELATIVE.format(Math.round(seconds / size), unit);
}

export function dateAndTime(date) {
  return new Date(date).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) [count, unit] = [count / 1000, unit + 1];
  return `${number(count, unit && count < 10 ? 1 : 0)} ${units[unit]}`;
}

export function number(value, digits = 0) {
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

export function percent(share) {
  return `${Math.floor(share * 100)} %`;
}

/** Return a sum of dollars, which may be a small part of a cent. */
export function dollars(value, digits = 4) {
  return `$${number(value, digits)}`;
}

export function plural(count, one, many = `${one}s`) {
  return `${number(count)} ${count === 1 ? one : many}`;
}

/** Return the name of a file by its path in storage. */
export function fileName(path) {
  return path.slice(path.lastIndexOf("/") + 1);
}

/** Return whom a URL leads to: its host and port. */
export function hostOf(url) {
  try {
    return new URL(url).host;
  } catch {
    return "–";
  }
}
