// The page of `mixlab ui`: what is in the folders of runs and studies, also while they change.

import { chart, sample } from "./chart.js";
import { drawConfusion, drawDifferences, drawResults } from "./compare.js";
import { byId, dateOf, duration, language, make, number, percent, startSpeaking, text } from "./language.js";
import { TEXTS } from "./ui_texts.js";

const LOOKS = [  // of lines: they differ in more than color
  ["#0072B2", ""], ["#D55E00", "7 4"], ["#009E73", "2 3"], ["#CC79A7", "9 3 2 3"], ["#E69F00", "12 4"], ["#56B4E9", "4 2"],
];
const [FAST, SLOW, LONGEST] = [3000, 15000, 60000];  // milliseconds: while something trains; else; after errors
const LIVE_SECONDS = 300;  // since the last change of a run that may still train
const chosen = [];  // names, in the order in which they were chosen
const details = new Map();
const lines = new Map();  // the rows of the table, by name: what has the focus keeps it
let token = "", rows = [], found = null, sorting = { key: "", up: true }, timer = 0, wait = FAST, isAsking = false;

const stateOf = row => row.unreadable ? "unreadable" : row.finished ? "finished" : "unfinished";

async function ask(path) {
  let answer, value;
  try {
    answer = await fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {} });
    value = await answer.json();
  } catch {
    throw new Error(text("unreachable"));
  }
  if (answer.status === 401) byId("token-form").hidden = false;
  if (!answer.ok) throw new Error(value.error.message);
  byId("token-form").hidden = true;
  return value;
}

const runAddress = name => `api/runs/${encodeURIComponent(name)}`;

async function load() {
  found = await ask("api/runs");
  rows = found.runs;
  const names = new Set(rows.map(row => row.run));
  chosen.splice(0, chosen.length, ...chosen.filter(name => names.has(name)));
  for (const name of chosen) {
    if (!details.get(name)?.finished) details.set(name, await ask(runAddress(name)));
  }
}

// Ask again and again: often while something trains, seldom after errors, and not while nobody looks.
async function poll() {
  clearTimeout(timer);
  if (isAsking || document.hidden) return;
  isAsking = true;
  try {
    await load();
    const isLive = rows.some(row => stateOf(row) === "unfinished" && row.idle_seconds < LIVE_SECONDS);
    wait = isLive ? FAST : SLOW;
    byId("status").textContent = "";
    draw();
  } catch (error) {
    wait = Math.min(2 * Math.max(wait, FAST), LONGEST);
    byId("status").textContent = `${error.message} ${text("retry", wait / 1000)}`;
  }
  isAsking = false;
  timer = setTimeout(poll, wait);
}

function draw() {
  if (!found) return;
  byId("facts").textContent = text("facts", rows.length, found.folder);
  drawFilters();
  drawRuns();
  drawStudies(found.studies, found.missing_studies);
  drawChosen();
}

function drawFilters() {
  const choices = {
    data: rows.map(row => row.data), model: rows.map(row => row.model), state: rows.map(stateOf),
  };
  for (const [key, values] of Object.entries(choices)) {
    const select = byId(`filter-${key}`), old = select.value;
    const names = [...new Set(values)].filter(Boolean).sort();
    const options = names.map(name => make("option", key === "state" ? text("states")[name] : name, { value: name }));
    const fresh = [make("option", text("all"), { value: "" }), ...options];
    if (fresh.map(o => o.outerHTML).join() === [...select.options].map(o => o.outerHTML).join()) continue;
    select.replaceChildren(...fresh);
    select.value = names.includes(old) ? old : "";
  }
}

function isWanted(row) {
  const words = byId("search").value.toLowerCase().split(/\s+/);
  const all = [row.run, row.data, row.model].join(" ").toLowerCase();
  const [data, model, state] = ["data", "model", "state"].map(key => byId(`filter-${key}`).value);
  return words.every(word => all.includes(word)) && (!data || row.data === data) && (!model || row.model === model) &&
    (!state || stateOf(row) === state);
}

function inOrder(all) {
  const { key, up } = sorting, value = row => key === "started" ? Date.parse(row.started) : row[key];
  if (!key) return all;  // as the server has them: best first
  const isKnown = row => value(row) !== null && !Number.isNaN(value(row));
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    const less = typeof x === "number" ? x - y : x.localeCompare(y, language(), { numeric: true });
    return up ? less : -less;
  };
  return [...all.filter(isKnown).sort(compare), ...all.filter(row => !isKnown(row))];
}

function lineOf(name) {
  if (lines.has(name)) return lines.get(name);
  const line = make("tr"), box = make("input", undefined, { type: "checkbox" });
  for (let i = 0; i < 9; i++) line.append(i === 1 ? make("th", name, { scope: "row" }) : make("td"));
  line.cells[0].append(box);
  line.cells[1].append(make("small", "", { class: "quiet" }));
  box.addEventListener("change", () => choose(name, box.checked));
  lines.set(name, line);
  return line;
}

async function choose(name, isChosen) {
  if (isChosen) chosen.push(name); else chosen.splice(chosen.indexOf(name), 1);
  drawRuns();
  try {
    if (isChosen && !details.has(name)) details.set(name, await ask(runAddress(name)));
  } catch (error) {
    byId("status").textContent = error.message;
  }
  drawChosen();
}

function drawRuns() {
  const shown = inOrder(rows.filter(isWanted)).map(row => {
    const line = lineOf(row.run), box = line.cells[0].firstChild, state = stateOf(row);
    box.setAttribute("aria-label", text("chooseRun", row.run));
    box.checked = chosen.includes(row.run);
    box.disabled = !box.checked && chosen.length >= LOOKS.length;
    const more = state === "unreadable" ? `: ${row.unreadable}`
      : state === "unfinished" && row.idle_seconds !== null ? `, ${text("lastChange", duration(row.idle_seconds))}` : "";
    line.cells[1].lastChild.textContent = state === "finished" ? "" : text("states")[state] + more;
    const cells = [percent(row.validation_top1, 2), percent(row.test_top1, 2), row.data ?? "–", row.model ?? "–",
      row.started ? dateOf(row.started) : "–", number(row.steps), duration(row.seconds)];
    cells.forEach((words, i) => { line.cells[i + 2].textContent = words; });
    return line;
  });
  const now = [...byId("runs").rows];
  if (shown.length !== now.length || shown.some((line, i) => line !== now[i])) byId("runs").replaceChildren(...shown);
  byId("count").textContent = text("count", shown.length, rows.length);
  for (const button of document.querySelectorAll(".runs th button")) {
    const order = button.dataset.key === sorting.key ? (sorting.up ? "ascending" : "descending") : "none";
    button.parentElement.setAttribute("aria-sort", order);
  }
}

let drawnChosen = "";

function drawChosen() {
  const runs = chosen.map(name => details.get(name)).filter(Boolean);
  for (const run of runs) run.row = rows.find(row => row.run === run.run);
  const smoothing = Number(byId("smoothing").value);
  const now = JSON.stringify([runs, smoothing, language()], (key, value) => key === "idle_seconds" ? 0 : value);
  if (now === drawnChosen) return;  // what is read there stays
  drawnChosen = now;
  byId("curves").hidden = !runs.length;
  byId("compare").hidden = byId("details").hidden = runs.length < 2;
  byId("one").hidden = runs.length !== 1;
  drawCurves(runs, smoothing);
  if (runs.length === 1) drawOne(runs[0]);
  if (runs.length < 2) return;
  drawResults(runs);
  drawDifferences(runs);
  drawConfusion(runs);
}

function drawCurves(runs, smoothing) {
  const curves = (event, column) => runs.map((run, i) => ({
    name: run.run, color: LOOKS[i][0], dash: LOOKS[i][1],
    points: run.curves[event].filter(p => p[0] !== null && p[column] !== null).map(p => [p[0], p[column]]),
  }));
  const share = (value, digits) => percent(value, digits === undefined ? 2 : Math.max(digits - 2, 0));
  const plain = (value, digits = 3) => value.toFixed(digits);
  chart(byId("top1"), curves("validation", 2), { label: text("accuracyCurve"), format: share, smoothing });
  chart(byId("loss"), curves("train", 1), { label: text("lossCurve"), format: plain, smoothing });
  byId("smoothed").textContent = smoothing;
  byId("legend").replaceChildren(...runs.map((run, i) => {
    const item = make("li", run.run);
    item.prepend(sample(...LOOKS[i]));
    return item;
  }));
}

// The address of a file of a run or study. Links and images send no token, so the address has a key.
const fileOf = (kind, name, found) => file =>
  `files/${kind}/${encodeURIComponent(name)}/${file}${found.key ? `?key=${found.key}` : ""}`;
const figures = (names, address) => names.map(name => make("img", undefined, {
  src: address(`figures/${encodeURIComponent(name)}`), alt: name.replace(".png", ""), loading: "lazy", class: "wide",
}));

function drawOne(run) {
  const address = fileOf("runs", run.run, run);
  byId("one-title").textContent = run.run;
  byId("report").replaceChildren(run.has_report ? make("a", text("report"), { href: address("report.html") })
    : make("span", text("noReport"), { class: "quiet" }),
    ...run.unreadable.map(reason => make("span", ` ${text("leftOut", reason)}`)));
  byId("figures").replaceChildren(...figures(run.figures, address));
  byId("recipe").textContent = run.recipe;
}

let drawnStudies = "";

function drawStudies(studies, missing) {
  const now = JSON.stringify([studies, missing, language()]);
  if (now === drawnStudies) return;  // what is open stays open
  drawnStudies = now;
  const items = studies.map(study => {
    const item = make("li"), address = fileOf("studies", study.study, study);
    item.append(make("strong", study.study), " ");
    if (study.has_report) item.append(make("a", text("studyReport"), { href: address("report.html") }));
    const more = make("details");
    more.append(make("summary", text("more", study.study)));
    more.addEventListener("toggle", async () => {
      if (!more.open || more.children.length > 1) return;
      try {
        const found = await ask(`api/studies/${encodeURIComponent(study.study)}`);
        more.append(...figures(found.figures, address), ...found.tables.map(drawTable));
      } catch (error) {
        byId("status").textContent = error.message;
      }
    });
    item.append(more);
    return item;
  });
  for (const study of missing) {
    const item = make("li", text("missing", study.study));
    item.append(make("code", study.command));
    items.push(item);
  }
  byId("studies").replaceChildren(...items);
}

function drawTable(found) {
  const place = make("div", undefined, { class: "scroll", tabindex: "0", role: "group", "aria-label": found.name });
  const table = make("table");
  table.append(make("caption", text("table", found.name, found.rows.length, found.num_rows)));
  const head = table.createTHead().insertRow();
  for (const name of found.columns) head.append(make("th", name, { scope: "col" }));
  const body = table.createTBody();
  for (const row of found.rows) {
    const line = body.insertRow();
    for (const words of row) line.insertCell().textContent = words;
  }
  place.append(table);
  return place;
}

byId("token-form").addEventListener("submit", event => {
  event.preventDefault();
  token = byId("token").value;
  poll();
});
byId("search").addEventListener("input", drawRuns);
for (const key of ["data", "model", "state"]) byId(`filter-${key}`).addEventListener("change", drawRuns);
byId("none").addEventListener("click", () => {
  chosen.splice(0);
  drawRuns();
  drawChosen();
});
for (const button of document.querySelectorAll(".runs th button")) {
  button.addEventListener("click", () => {
    sorting = { key: button.dataset.key, up: sorting.key === button.dataset.key ? !sorting.up : true };
    drawRuns();
  });
}
byId("smoothing").addEventListener("input", drawChosen);
document.addEventListener("visibilitychange", poll);
startSpeaking(TEXTS, draw);
poll();
