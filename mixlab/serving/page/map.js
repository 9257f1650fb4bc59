// Which parts of a picture mattered: how far the probability falls where a part of it is hidden.

import { byId, make, text } from "./language.js";

// The least fall, its color and what the legend says. Always the same, so that maps of two images can be compared.
const SCALE = [[0.01, "#ffffb2", "1–5"], [0.05, "#fecc5c", "5–20"], [0.2, "#fd8d3c", "20–50"], [0.5, "#d7191c", "50–100"]];
const RISES = [[0.01, "#a6cee3", "1–5"], [0.05, "#2c7fb8", "5–100"]];
const LEAST = SCALE[0][0];

const colorOf = fall => (fall < 0 ? RISES : SCALE).findLast(([least]) => Math.abs(fall) >= least)?.[1];

function sentence({ drop, label, seconds }) {
  const all = drop.flat(), most = Math.max(...all), first = all.indexOf(most), columns = drop[0].length;
  if (most >= LEAST) {
    return text("mapText", label, most, Math.floor(first / columns) + 1, drop.length, first % columns + 1, columns,
      seconds);
  }
  return text(Math.min(...all) <= -LEAST ? "mapRises" : "mapNone", label);
}

function drawScale() {
  const line = (title, steps) => {
    const item = make("li", `${title}: `);
    for (const [, color, name] of steps) {
      const patch = make("span", undefined, { class: "patch", "aria-hidden": "true" });
      patch.style.backgroundColor = color;
      item.append(patch, `${name}  `);
    }
    return item;
  };
  byId("scale").replaceChildren(line(text("lowers"), SCALE), line(text("rises"), RISES));
}

function drawNumbers(drop) {
  byId("map-numbers").replaceChildren(...drop.map(values => {
    const row = make("tr");
    row.append(...values.map(value => make("td", (100 * value).toFixed(1).replace(/^-0\.0$/, "0.0"))));
    return row;
  }));
}

function place(drop, seen) {
  const canvas = byId("map"), [width, height] = seen.map(part => 100 * part);
  Object.assign(canvas.style, {
    left: `${(100 - width) / 2}%`, top: `${(100 - height) / 2}%`, width: `${width}%`, height: `${height}%`,
  });
  [canvas.width, canvas.height] = [drop[0].length, drop.length];  // a pixel a part; the style makes them large
  const pen = canvas.getContext("2d");
  pen.globalAlpha = 0.65;
  drop.forEach((values, y) => values.forEach((value, x) => {
    const color = colorOf(value);
    if (color) {
      pen.fillStyle = color;
      pen.fillRect(x, y, 1, 1);
    }
  }));
}

// Lay `map`, an answer of /occlusion, over the picture, which is loaded; null takes it away.
// seen: the shares of its width and height that the model takes in.
export function drawMap(map, seen) {
  byId("map").hidden = byId("map-legend").hidden = !map;
  byId("map-text").textContent = map ? sentence(map) : "";
  if (!map) return;
  drawScale();
  drawNumbers(map.drop);
  place(map.drop, seen);
}
