// The table of all files: a row each, filled as its answer comes; counts of classes; a CSV file.

import { byId, language, make, percent, text } from "./language.js";

const SHOWN_COUNTS = 20;  // classes; the others open on a click
export const pictures = [];  // {name, blob, url, predictions, error, map, row}; error: a function that says it
let sorting = { key: "", up: true };

// Add a row. thumbnail: makes what stands for a file; show: called when that is chosen.
export function addRow(picture, thumbnail, show) {
  picture.row = make("tr");
  for (let i = 0; i < 4; i++) picture.row.insertCell();
  if (!picture.error) {
    const button = make("button", undefined, { type: "button" });
    button.disabled = true;
    button.append(thumbnail(picture));
    button.addEventListener("click", () => show(picture));
    picture.row.cells[0].append(button);
  }
  pictures.push(picture);
  byId("rows").append(picture.row);
  fillRow(picture);
}

// Write into a row what is known now.
export function fillRow(picture) {
  const { row, predictions, error } = picture, [image, label, probability, name] = row.cells;
  name.textContent = picture.name;
  label.classList.toggle("bad", Boolean(error));
  label.textContent = error ? error() : predictions ? predictions[0].label : "...";
  label.colSpan = error ? 2 : 1;
  probability.hidden = Boolean(error);
  probability.textContent = predictions ? percent(predictions[0].probability) : "";
  if (error) return image.replaceChildren();
  image.firstChild.disabled = !predictions;
  image.firstChild.setAttribute("aria-label", text("show", picture.name));
}

export function drawTable() {
  byId("many").hidden = pictures.length < 2;
  const value = ({ name, predictions }) => ({
    name, label: predictions?.[0].label ?? "", probability: predictions?.[0].probability ?? -1,
  })[sorting.key];
  const order = [...pictures];
  if (sorting.key) {
    order.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      const found = typeof x === "number" ? x - y : x.localeCompare(y, language(), { numeric: true });
      return sorting.up ? found : -found;
    });
  }
  byId("rows").replaceChildren(...order.map(picture => picture.row));
  for (const heading of document.querySelectorAll("th[aria-sort]")) {
    const isMine = heading.firstElementChild.dataset.key === sorting.key;
    heading.setAttribute("aria-sort", isMine ? (sorting.up ? "ascending" : "descending") : "none");
  }
  drawCounts();
}

export function drawCounts() {
  const counts = new Map();
  for (const { predictions } of pictures) {
    if (predictions) counts.set(predictions[0].label, (counts.get(predictions[0].label) ?? 0) + 1);
  }
  const items = [...counts].sort((a, b) => b[1] - a[1]).map(([label, n]) => make("li", text("counted", label, n)));
  const left = items.splice(SHOWN_COUNTS);
  const bad = pictures.filter(picture => picture.error).length;
  if (bad) items.push(make("li", text("noLabel", bad), { class: "bad" }));
  byId("counts").replaceChildren(...items);
  byId("other-counts").hidden = !left.length;
  byId("other-counts").firstElementChild.textContent = text("more", left.length);
  byId("other-counts").lastElementChild.replaceChildren(...left);
}

export function csvText() {
  // A cell that begins like a formula would be one in a spreadsheet.
  const cell = value => `"${String(value).replace(/^(['=+\-@\t\r\n])/, "'$1").replaceAll('"', '""')}"`;
  const lines = [["path", "rank", "label", "probability", "error"].join(",")];
  for (const picture of pictures) {
    if (picture.error) lines.push([cell(picture.name), "", "", "", cell(picture.error())].join(","));
    (picture.predictions || []).forEach((guess, rank) => lines.push(
      [cell(picture.name), rank + 1, cell(guess.label), guess.probability.toFixed(6), ""].join(",")));
  }
  return `\ufeff${lines.join("\r\n")}\r\n`;
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    sorting = { key: button.dataset.key, up: sorting.key === button.dataset.key ? !sorting.up : true };
    drawTable();
  });
}
