"use strict";

const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "12 4", "4 2"];
const REFRESH = 3000;  // milliseconds, while something trains
const byId = id => document.getElementById(id);
const chosen = [];  // names, in the order in which they were chosen
const details = new Map();
let token = "", rows = [];

const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const draw = (tag, attributes, parent) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
};
const percent = share => share === null || share === undefined ? "–" : `${(100 * share).toFixed(2)} %`;
const time = seconds => seconds >= 3600 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 60)} min`;

async function ask(path) {
  const answer = await fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {} });
  if (answer.status === 401) byId("token-form").hidden = false;
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error.message);
  byId("token-form").hidden = true;
  return value;
}

async function refresh() {
  try {
    const found = await ask("api/runs");
    rows = found.runs;
    byId("facts").textContent = `${rows.length} runs in ${found.folder}`;
    drawRuns();
    drawStudies(found.studies, found.missing_studies);
    for (const name of chosen) {
      const old = details.get(name);
      if (!old || !old.finished) details.set(name, await ask(`api/runs/${encodeURIComponent(name)}`));
    }
    drawChosen();
    byId("status").textContent = "";
  } catch (error) {
    byId("status").textContent = error.message;
  }
  if (rows.some(row => !row.finished && !row.unreadable)) setTimeout(refresh, REFRESH);
}

function drawRuns() {
  byId("runs").replaceChildren(...rows.map(row => {
    const line = make("tr"), box = make("input", undefined, { type: "checkbox", "aria-label": `Choose ${row.run}` });
    box.checked = chosen.includes(row.run);
    box.disabled = !box.checked && chosen.length >= COLORS.length;
    box.addEventListener("change", async () => {
      if (box.checked) chosen.push(row.run); else chosen.splice(chosen.indexOf(row.run), 1);
      if (box.checked && !details.has(row.run)) {
        details.set(row.run, await ask(`api/runs/${encodeURIComponent(row.run)}`));
      }
      drawRuns();
      drawChosen();
    });
    line.insertCell().append(box);
    const state = row.unreadable ? ` (unreadable: ${row.unreadable})` : row.finished ? "" : " (not finished)";
    line.insertCell().textContent = row.run + state;
    line.insertCell().textContent = percent(row.validation_top1);
    line.insertCell().textContent = percent(row.test_top1);
    line.insertCell().textContent = row.steps.toLocaleString("en");
    line.insertCell().textContent = time(row.seconds);
    return line;
  }));
}

function chart(place, lines, format) {
  const [width, height, left, bottom] = [420, 240, 46, 26];
  const points = lines.flatMap(line => line.points);
  place.replaceChildren();
  if (!points.length) return place.append(make("p", "Nothing was recorded yet.", { class: "quiet" }));
  const [xs, ys] = [0, 1].map(axis => points.map(point => point[axis]));
  const [xLow, xHigh] = [0, Math.max(...xs) || 1];
  const [yLow, yHigh] = [Math.min(...ys), Math.max(...ys)];
  const x = value => left + (width - left - 8) * (value - xLow) / (xHigh - xLow);
  const y = value => height - bottom - (height - bottom - 10) * (value - yLow) / ((yHigh - yLow) || 1);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "chart" }, place);
  for (let i = 0; i <= 4; i++) {
    const [vx, vy] = [xLow + (xHigh - xLow) * i / 4, yLow + (yHigh - yLow) * i / 4];
    draw("line", { x1: left, x2: width - 8, y1: y(vy), y2: y(vy), class: "grid" }, svg);
    draw("text", { x: left - 5, y: y(vy) + 4, "text-anchor": "end" }, svg).textContent = format(vy);
    draw("text", { x: x(vx), y: height - 8, "text-anchor": "middle" }, svg).textContent = vx.toFixed(xHigh < 8 ? 1 : 0);
  }
  for (const line of lines) {
    const path = line.points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    const style = { d: path, fill: "none", stroke: line.color, "stroke-dasharray": line.dash, "stroke-width": 2 };
    const drawn = draw("path", style, svg);
    draw("title", {}, drawn).textContent = line.name;
  }
}

function drawChosen() {
  const runs = chosen.map(name => details.get(name)).filter(Boolean);
  byId("curves").hidden = !runs.length;
  byId("compare").hidden = runs.length !== 2;
  byId("one").hidden = runs.length !== 1;
  const look = i => ({ color: COLORS[i], dash: DASHES[i] });
  const lines = (event, column) => runs.map((run, i) => ({
    name: run.run, ...look(i), points: run.curves[event].filter(p => p[0] !== null && p[column] !== null).map(p => [p[0], p[column]]),
  }));
  chart(byId("top1"), lines("validation", 2), value => `${(100 * value).toFixed(0)} %`);
  chart(byId("loss"), lines("train", 1), value => value.toFixed(2));
  byId("legend").replaceChildren(...runs.map((run, i) => {
    const item = make("li", run.run), svg = draw("svg", { viewBox: "0 0 30 8", width: 30, height: 8 }, item);
    draw("path", { d: "M0 4H30", stroke: look(i).color, "stroke-dasharray": look(i).dash, "stroke-width": 3 }, svg);
    item.prepend(svg);
    return item;
  }));
  if (runs.length === 1) drawOne(runs[0]);
  if (runs.length === 2) compare(...runs);
}

// The address of a file of a run or study. Links and pictures send no token, so the address has a key.
const fileOf = (kind, name, found) => file =>
  `files/${kind}/${encodeURIComponent(name)}/${file}${found.key ? `?key=${found.key}` : ""}`;
const pictures = (names, address) => names.map(name => make("img", undefined, {
  src: address(`figures/${encodeURIComponent(name)}`), alt: name.replace(".png", ""), loading: "lazy", class: "wide",
}));

function drawOne(run) {
  const address = fileOf("runs", run.run, run);
  byId("one-title").textContent = run.run;
  byId("report").replaceChildren(run.has_report ? make("a", "Its whole report", { href: address("report.html") })
    : make("span", "Its report comes when it is finished.", { class: "quiet" }),
    ...run.unreadable.map(reason => make("p", `Left out, because it cannot be read: ${reason}`)));
  byId("figures").replaceChildren(...pictures(run.figures, address));
  byId("recipe").textContent = run.recipe;
}

function keys(run) {
  const found = new Map();
  let group = "";
  for (const line of run.recipe.split("\n")) {
    const title = line.match(/^\[(.+)\]$/), pair = line.match(/^(\w+) = (.*)$/);
    if (title) group = `${title[1]}.`;
    if (pair) found.set(group + pair[1], pair[2]);
  }
  const test = run.result.test || {};
  const top = test.num_images ? `${percent(test.num_correct / test.num_images)} (${test.num_correct} of ${test.num_images})` : "–";
  found.set("test accuracy", top);
  for (const key of ["num_parameters", "steps", "seconds", "images_per_second"]) {
    if (run.result[key] !== undefined && run.result[key] !== null) found.set(key, String(Math.round(run.result[key])));
  }
  return found;
}

function compare(a, b) {
  [byId("first").textContent, byId("second").textContent] = [a.run, b.run];
  const [left, right] = [keys(a), keys(b)];
  const differing = [...new Set([...left.keys(), ...right.keys()])].filter(key => left.get(key) !== right.get(key));
  byId("differences").replaceChildren(...differing.map(key => {
    const line = make("tr");
    for (const text of [key, left.get(key) ?? "–", right.get(key) ?? "–"]) line.append(make("td", text));
    return line;
  }));
  byId("confusion").replaceChildren();
  const same = a.confusion && b.confusion && a.confusion.classes.join("\n") === b.confusion.classes.join("\n");
  if (!same) return;
  const table = make("table", undefined, { class: "matrix" }), names = a.confusion.classes;
  table.append(make("caption", `How many more test images ${b.run} puts there than ${a.run}: true class in rows, answer in columns`));
  const head = table.createTHead().insertRow();
  for (const name of ["", ...names]) head.append(make("th", name, { scope: "col" }));
  const body = table.createTBody();
  const most = Math.max(1, ...names.flatMap((_, i) => names.map((_, j) => Math.abs(b.confusion.counts[i][j] - a.confusion.counts[i][j]))));
  names.forEach((name, i) => {
    const line = body.insertRow();
    line.append(make("th", name, { scope: "row" }));
    names.forEach((_, j) => {
      const more = b.confusion.counts[i][j] - a.confusion.counts[i][j], cell = line.insertCell();
      cell.textContent = more > 0 ? `+${more}` : more === 0 ? "" : String(more);
      const isGood = (more > 0) === (i === j);
      cell.style.backgroundColor = more ? `rgba(${isGood ? "0, 114, 178" : "213, 94, 0"}, ${0.6 * Math.abs(more) / most})` : "";
    });
  });
  byId("confusion").append(table);
}

let drawnStudies = "";

function drawStudies(studies, missing) {
  const now = JSON.stringify([studies, missing]);
  if (now === drawnStudies) return;  // what is open stays open
  drawnStudies = now;
  const items = studies.map(study => {
    const item = make("li"), address = fileOf("studies", study.study, study);
    item.append(make("strong", study.study), " ");
    if (study.has_report) item.append(make("a", "Report", { href: address("report.html") }));
    const more = make("details");
    more.append(make("summary", `Figures and tables of ${study.study}`));
    more.addEventListener("toggle", async () => {
      if (!more.open || more.children.length > 1) return;
      try {
        const found = await ask(`api/studies/${encodeURIComponent(study.study)}`);
        more.append(...pictures(found.figures, address), ...found.tables.map(drawTable));
      } catch (error) {
        byId("status").textContent = error.message;
      }
    });
    item.append(more);
    return item;
  });
  for (const study of missing) {
    const item = make("li", `${study.study}: not here yet. `);
    item.append(make("code", study.command));
    items.push(item);
  }
  byId("studies").replaceChildren(...items);
}

function drawTable(found) {
  const place = make("div", undefined, { class: "scroll", tabindex: "0", role: "region", "aria-label": found.name });
  const table = make("table"), left = found.num_rows - found.rows.length;
  table.append(make("caption", found.name + (left ? `, the first ${found.rows.length} of ${found.num_rows} rows` : "")));
  const head = table.createTHead().insertRow();
  for (const name of found.columns) head.append(make("th", name, { scope: "col" }));
  const body = table.createTBody();
  for (const row of found.rows) {
    const line = body.insertRow();
    for (const text of row) line.insertCell().textContent = text;
  }
  place.append(table);
  return place;
}

byId("token-form").addEventListener("submit", event => {
  event.preventDefault();
  token = byId("token").value;
  refresh();
});
refresh();
