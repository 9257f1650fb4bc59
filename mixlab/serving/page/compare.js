// Several runs side by side: accuracy first, then what differs in their recipes and where they are wrong.

import { byId, duration, make, number, percent, points, text } from "./language.js";

// The rows of a table: cells of text, the first of each a heading.
function fill(table, headings, rows) {
  const head = make("tr");
  head.append(...headings.map(name => make("th", name, { scope: "col" })));
  const body = make("tbody");
  for (const [first, ...others] of rows) {
    const line = make("tr");
    line.append(make("th", first, { scope: "row" }), ...others.map(cell => make("td", cell)));
    body.append(line);
  }
  const top = make("thead");
  top.append(head);
  table.replaceChildren(top, body);
}

export function recipeKeys(run) {
  const found = new Map();
  let group = "";
  for (const line of run.recipe.split("\n")) {
    const title = line.match(/^\[(.+)\]$/), pair = line.match(/^(\w+) = (.*)$/);
    if (title) group = `${title[1]}.`;
    if (pair) found.set(group + pair[1], pair[2]);
  }
  return found;
}

// The share of right answers that runs are ordered by: of the test, else of validation.
const accuracy = ({ row }) => row.test_top1 ?? row.validation_top1 ?? -1;

// A row for each run, best first. Differences are to the best on the same data.
export function drawResults(runs) {
  const all = [...runs].sort((a, b) => accuracy(b) - accuracy(a));
  const subject = run => JSON.stringify([recipeKeys(run).get("data.source"), run.result.test?.num_images]);
  const difference = run => {
    if (run.row.test_top1 === null) return "–";
    const best = all.find(other => subject(other) === subject(run));
    return run === best ? text("best") : points(run.row.test_top1 - best.row.test_top1);
  };
  const known = (value, show) => value === undefined || value === null ? "–" : show(value);
  const headings = ["run", "testAccuracy", "difference", "validationAccuracy", "parameters", "steps", "time", "speed"];
  fill(byId("results"), headings.map(key => text(key)), all.map(run => {
    const { test, num_parameters: parameters, images_per_second: speed } = run.result, { row } = run;
    const counted = test?.num_images ? ` (${text("ofExamples", test.num_correct, test.num_images)})` : "";
    return [
      run.run, percent(row.test_top1, 2) + counted, difference(run), percent(row.validation_top1, 2),
      known(parameters, number), number(row.steps), duration(row.seconds), known(speed, value => number(Math.round(value))),
    ];
  }));
}

export function drawDifferences(runs) {
  const all = runs.map(recipeKeys), keys = [...new Set(all.flatMap(found => [...found.keys()]))];
  const differing = keys.filter(key => new Set(all.map(found => found.get(key))).size > 1);
  if (!differing.length) {
    const cell = make("td", text("sameRecipe")), line = make("tr");
    line.append(cell);
    return byId("differences").replaceChildren(line);
  }
  const rows = differing.map(key => [key, ...all.map(found => found.get(key) ?? "–")]);
  fill(byId("differences"), [text("key"), ...runs.map(run => run.run)], rows);
}

// How the confusion tables of two runs differ, where they have the same classes.
export function drawConfusion(runs) {
  const place = byId("confusion"), [a, b] = runs.map(run => run.confusion);
  place.hidden = !(runs.length === 2 && a && b && a.classes.join("\n") === b.classes.join("\n"));
  if (place.hidden) return;
  const names = a.classes, more = names.map((_, i) => names.map((_, j) => b.counts[i][j] - a.counts[i][j]));
  const most = Math.max(1, ...more.flat().map(Math.abs));
  const table = make("table", undefined, { class: "matrix" });
  const caption = make("caption", text("confusion", runs[0].run, runs[1].run));
  fill(table, ["", ...names], names.map((name, i) => [name, ...more[i].map(n => n > 0 ? `+${n}` : n === 0 ? "" : `${n}`)]));
  table.tHead.rows[0].cells[0].replaceWith(make("td"));  // a heading of nothing is none
  more.forEach((values, i) => values.forEach((value, j) => {
    const color = (value > 0) === (i === j) ? "0, 114, 178" : "213, 94, 0";
    if (value) table.tBodies[0].rows[i].cells[j + 1].style.backgroundColor = `rgba(${color}, ${0.4 * Math.abs(value) / most})`;
  }));
  table.prepend(caption);
  place.setAttribute("aria-label", caption.textContent);
  place.replaceChildren(table);
}
