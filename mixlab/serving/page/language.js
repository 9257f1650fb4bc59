// The language of a page: --lang of the server, else what the browser prefers; and how numbers look in it.

let texts = {}, now = "en", change = () => {};

export const byId = id => document.getElementById(id);
export const language = () => now;

export function text(key, ...values) {
  const found = texts[now][key];
  return typeof found === "function" ? found(...values) : found;
}

function speak(name) {
  now = document.documentElement.lang = byId("language").value = name;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  change();
}

// Speak in one of `tables` from now on; `changed` is called then, and whenever the reader takes another.
export function startSpeaking(tables, changed) {
  [texts, change] = [{ ...tables }, changed];
  const wanted = [document.documentElement.dataset.language, ...navigator.languages];
  byId("language").addEventListener("change", event => speak(event.target.value));
  speak(wanted.map(name => name.slice(0, 2)).find(name => name in tables) || "en");
}

// Say some things in other words, and more, from now on.
export function alsoSay(tables) {
  for (const [name, more] of Object.entries(tables)) texts[name] = { ...texts[name], ...more };
  speak(now);
}

export const number = value => value.toLocaleString(now);
export const percent = (share, digits = 1) => (share ?? null) === null ? "–" : `${(100 * share).toFixed(digits)}%`;
// The difference of two shares: percentage points, which Korean writes %p.
export const points = share => {
  const value = (100 * share).toFixed(1).replace(/^-0\.0$/, "0.0");
  return `${share > 0 && value !== "0.0" ? "+" : ""}${value}${text("points")}`;
};
// Decimal, as file managers and telephones show it.
export function fileSize(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 999500 ? `${Math.round(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

// The reader's own time, the same in every language: 2026-12-01 08:00.
export const dateOf = iso => new Date(iso).toLocaleString("sv", { dateStyle: "short", timeStyle: "short" });
export function duration(seconds) {
  if (seconds < 60) return text("seconds", Math.round(seconds));
  if (seconds < 5400) return text("minutes", Math.round(seconds / 60));
  return seconds < 172800 ? text("hours", (seconds / 3600).toFixed(1)) : text("days", Math.round(seconds / 86400));
}

// An element with a text and attributes.
export function make(tag, content, attributes = {}) {
  const element = document.createElement(tag);
  if (content !== undefined) element.textContent = content;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
