// The page of `mixlab serve`: files in, labels out. What is different for each kind of file is in KINDS.

import { images } from "./images.js";
import { alsoSay, byId, make, percent, startSpeaking, text } from "./language.js";
import { drawMap } from "./map.js";
import { TEXTS } from "./page_texts.js";
import { addRow, csvText, drawCounts, drawTable, fillRow, pictures } from "./results.js";
import { sounds } from "./sounds.js";

const KINDS = { images, sounds };  // by the modality of the model

const AT_ONCE = 4;  // requests
const MOST = 1000;  // files, for a browser holds them all
const FIRST_CLASSES = 5;
const MOST_TRIES = 5;  // where the server is busy
let token = "", facts = null, kind = null, shown = null;
let held = [];  // files that came before the server said what it takes

function say(message, isBad = false) {
  byId("status").textContent = message;
  byId("status").classList.toggle("bad", isBad);
}

function draw() {
  if (facts) drawFacts();
  if (shown) show(shown);
  pictures.forEach(fillRow);
  kind?.draw();
  drawTable();
}

function drawFacts() {
  const names = facts.class_names, first = names.slice(0, FIRST_CLASSES), left = names.length - first.length;
  byId("facts").textContent = text("facts", facts);
  byId("limit").textContent = text("limit", facts.max_body_bytes);
  byId("classes").hidden = false;
  byId("first-classes").textContent = `${text("classes", names.length)}: ${first.join(", ")}` +
    (left ? ` ${text("more", left)}` : "");
  byId("all-classes").replaceChildren(...names.map(name => make("li", name)));
}

// What the server says, in its own words; in another language after a sentence of ours.
function saidBy(error) {
  const own = text("kinds")[error.kind];
  return own ? `${own} (${error.message})` : error.message;
}

// A failure whose message is in the language of the moment in which it is read.
class Failure extends Error {
  constructor(say) {
    super(say());
    this.say = say;
  }
}

async function ask(path, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  for (let tries = 0; ; tries++) {
    let answer, value;
    try {
      answer = await fetch(path, { ...options, headers });
      value = await answer.json();
    } catch {
      throw new Failure(() => text("unreachable"));
    }
    if (answer.status === 401) {
      byId("token-form").hidden = false;
      const key = token ? "wrongToken" : "token";
      throw new Failure(() => text(key));
    }
    if ((answer.status === 503 || answer.status === 429) && tries < MOST_TRIES) {
      await new Promise(wake => setTimeout(wake, 1000 * Number(answer.headers.get("Retry-After") || 1)));
      continue;
    }
    if (!answer.ok) throw new Failure(() => saidBy(value.error));
    return value;
  }
}

async function loadFacts() {
  try {
    facts = await ask("info");
  } catch (error) {
    return say(error.message, true);
  }
  byId("title").textContent = facts.name;
  document.title = `${facts.name} – mixlab`;
  byId("token-form").hidden = true;
  if (!kind) {
    kind = KINDS[facts.modality];
    kind.start(add, say, facts);
    alsoSay(kind.texts);
    byId("files").accept = kind.accept;
    byId("drop").hidden = false;
  }
  if (!pictures.length) say("");  // what was said of an image stays
  if (held.length) add(held.splice(0));
}

// Why a file is not sent, as a function that says it.
function refusal({ blob }, isOneTooMany) {
  const { type, size } = blob, most = facts.max_body_bytes;
  if (type && !kind.isOne(type)) return () => text("noImage", type);  // without a type the server sees
  if (size > most) return () => text("tooLarge", size, most);
  return isOneTooMany ? () => text("tooMany", MOST) : undefined;
}

async function classify(picture) {
  let body;
  try {
    body = await picture.blob.arrayBuffer();
  } catch {
    throw new Failure(() => text("unreadable"));
  }
  return (await ask("predict?top=5", { method: "POST", body })).predictions;
}

// Send files, {name, blob}, a few at a time; each gets its row at once, and its answer as it comes.
async function add(files) {
  if (!facts) {
    held.push(...files);
    return loadFacts();
  }
  let room = MOST - pictures.filter(picture => !picture.error).length, done = 0, isShown = false;
  const fresh = files.map(file => {
    const error = file.error ?? refusal(file, room <= 0);
    if (!error) room--;
    return { ...file, error, url: error ? "" : URL.createObjectURL(file.blob) };
  });
  const choose = picture => { show(picture); byId("one").scrollIntoView({ block: "start" }); };
  for (const picture of fresh) addRow(picture, kind.thumbnail, choose);
  drawTable();
  const waiting = fresh.filter(picture => !picture.error), all = waiting.length;
  if (all) say(text("working", 0, all));
  const work = async () => {
    for (let picture = waiting.shift(); picture; picture = waiting.shift()) {
      try {
        picture.predictions = await classify(picture);
      } catch (error) {
        picture.error = error.say;
      }
      if (!pictures.includes(picture)) continue;  // cleared meanwhile
      fillRow(picture);
      drawCounts();
      const first = fresh.find(other => !other.error);
      if (!isShown && first?.predictions) {
        isShown = true;
        show(first);
      }
      say(text("working", ++done, all));
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  drawTable();
  const bad = fresh.filter(picture => picture.error), good = fresh.filter(picture => picture.predictions);
  const isCleared = fresh.length && !pictures.includes(fresh[0]);
  if (isCleared) return;
  say(bad.length ? text("failed", good.length, bad.length, bad[0].name, bad[0].error()) : text("ready", good.length),
    bad.length > 0);
}

async function show(picture) {
  const image = byId("picture"), best = picture.predictions[0];
  shown = picture;
  byId("one").hidden = false;
  byId("one-title").textContent = picture.name;
  image.alt = text("alt", picture.name, best.label, best.probability);
  byId("bars").replaceChildren(...picture.predictions.map(guess => {
    const item = make("li"), fill = make("span", undefined, { class: "fill" });
    fill.style.width = percent(guess.probability);
    item.append(fill, make("span", percent(guess.probability), { class: "value" }),
      make("span", guess.label, { class: "label" }));
    return item;
  }));
  byId("explain").textContent = text(picture.map ? "hideMap" : "explain");
  drawMap(null);
  let source = "";
  try {
    source = await kind.source(picture, ask);
  } catch (error) {
    say(error.message, true);
  }
  if (picture !== shown) return;
  if (image.src !== source) image.src = source;
  const isSeen = await image.decode().then(() => true, () => false);
  if (picture !== shown) return;
  byId("pixels").textContent = kind.caption(picture, isSeen && image);
  drawMap(picture.map, kind.seen(facts, image));
}

// Files of a drop, those in folders too. `transfer` forgets its items after the first await.
async function filesOf(transfer) {
  const found = [], entries = [...transfer.items].map(item => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return named(transfer.files);
  for (let entry = entries.shift(); entry; entry = entries.shift()) {
    const name = entry.fullPath.replace(/^\//, "");
    try {
      if (entry.isFile) found.push({ name, blob: await new Promise((good, bad) => entry.file(good, bad)) });
      else entries.push(...await inside(entry.createReader()));
    } catch {
      found.push({ name, blob: new Blob(), error: () => text("unreadable") });
    }
  }
  return found;
}

async function inside(reader) {
  const found = [];
  for (;;) {  // a hundred come at a time
    const part = await new Promise((good, bad) => reader.readEntries(good, bad));
    if (!part.length) return found;
    found.push(...part);
  }
}

const named = files => [...files].map(blob => ({ name: blob.name || text("cameraName"), blob }));

byId("token-form").addEventListener("submit", event => {
  event.preventDefault();
  token = byId("token").value;
  byId("token").value = "";
  loadFacts();
});
byId("files").addEventListener("change", event => { add(named(event.target.files)); event.target.value = ""; });
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, async event => {
    event.preventDefault();
    byId("drop").classList.toggle("over", name === "dragover");
    if (name !== "drop") return;
    const files = await filesOf(event.dataTransfer);
    if (files.length) add(files);
    else say(text("noFiles"), true);
  });
}
document.addEventListener("paste", event => {
  if (event.clipboardData.files.length) add(named(event.clipboardData.files));
  else if (event.target.tagName !== "INPUT") say(text("noPaste"), true);
});
byId("explain").addEventListener("click", async () => {
  const picture = shown;
  if (picture.map) picture.map = null;
  else {
    say(text("explaining"));
    try {
      const { blob: body } = picture;
      picture.map = await ask("occlusion", { method: "POST", body });
      say("");
    } catch (error) {
      say(error.message, true);
    }
  }
  if (picture === shown) show(picture);
});
byId("csv").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csvText()], { type: "text/csv" }));
  link.download = "predictions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
byId("clear").addEventListener("click", () => {
  for (const picture of pictures.splice(0)) URL.revokeObjectURL(picture.url);
  shown = null;
  byId("one").hidden = true;
  drawTable();
  say("");
});
startSpeaking(TEXTS, draw);
loadFacts();
