// A chart of lines: rounded ticks, smoothing, and the values under the pointer or the arrow keys.

import { make, text } from "./language.js";

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [420, 240, 46, 10, 10, 26];

function draw(tag, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
}

// A piece of a line, for a legend.
export function sample(color, dash) {
  const svg = draw("svg", { viewBox: "0 0 30 8", width: 30, height: 8, "aria-hidden": true }, document.createDocumentFragment());
  draw("path", { d: "M0 4H30", stroke: color, "stroke-dasharray": dash, "stroke-width": 3 }, svg);
  return svg;
}

// Multiples of 1, 2 or 5 times a power of ten that enclose low to high, about `count` of them.
export function ticks(low, high, count = 5) {
  const span = high - low || Math.abs(high) / 10 || 1, power = 10 ** Math.floor(Math.log10(span / count));
  const step = [1, 2, 5, 10].map(times => times * power).find(size => span / size <= count);
  const last = Math.ceil(high / step - 1e-9), first = Math.min(Math.floor(low / step + 1e-9), last - 1);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const all = Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toFixed(digits)));
  return { all, digits };
}

// The moving average of [x, y] points that forgets by `weight` a point, without its pull to zero at the beginning.
export function smooth(points, weight) {
  let sum = 0, left = 1;
  return points.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    left *= weight;
    return [x, sum / (1 - left)];
  });
}

const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);

function axes(svg, x, y, [xTicks, yTicks], format) {
  for (const value of yTicks.all) {
    draw("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "grid" }, svg);
    draw("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, svg).textContent = format(value, yTicks.digits);
  }
  for (const value of xTicks.all.filter(value => x(value) <= WIDTH - RIGHT + 1)) {
    const anchor = x(value) > WIDTH - RIGHT - 15 ? "end" : "middle";  // at the edge half a number would be cut off
    const label = draw("text", { x: x(value), y: HEIGHT - 8, "text-anchor": anchor }, svg);
    label.textContent = value.toFixed(xTicks.digits);
  }
}

// Draw lines {name, color, dash, points: [[epoch, value]]} into `place`. format: a value, with digits or finely.
export function chart(place, lines, { label, format, smoothing }) {
  lines = lines.filter(line => line.points.length);
  if (!lines.length) return place.replaceChildren(make("p", text("nothing"), { class: "quiet" }));
  const drawn = lines.map(line => ({ ...line, smooth: smoothing ? smooth(line.points, smoothing) : line.points }));
  const [xs, ys] = [0, 1].map(axis => lines.flatMap(line => line.points.map(point => point[axis])));
  const found = [ticks(0, Math.max(...xs)), ticks(Math.min(...ys), Math.max(...ys))];
  const [xLow, xHigh, yLow, yHigh] = [0, Math.max(...xs), found[1].all[0], found[1].all.at(-1)];
  const x = value => LEFT + (WIDTH - LEFT - RIGHT) * (value - xLow) / (xHigh - xLow);
  const y = value => HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - yLow) / (yHigh - yLow);
  const svg = draw("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", tabindex: 0, role: "slider", "aria-label": label,
    "aria-valuemin": 0, "aria-valuemax": xHigh,
  }, document.createDocumentFragment());
  axes(svg, x, y, found, format);
  const path = (points, line, faint) => draw("path", {
    d: points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join(""), fill: "none",
    stroke: line.color, "stroke-dasharray": faint ? "" : line.dash, "stroke-width": faint ? 1 : 2, class: faint ? "faint" : "line",
  }, svg);
  for (const line of drawn) {
    if (smoothing) path(line.points, line, true);
    path(line.smooth, line, false);
  }
  const cursor = draw("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" }, svg);
  const values = make("ul", undefined, { class: "chips values" });
  values.append(make("li", text("readHint"), { class: "quiet" }));

  const stops = [...new Set(xs)].sort((a, b) => a - b);
  let at = stops.length - 1;
  function read(index) {
    at = Math.min(Math.max(index, 0), stops.length - 1);
    cursor.setAttribute("x1", x(stops[at]));
    cursor.setAttribute("x2", x(stops[at]));
    cursor.setAttribute("visibility", "visible");
    const isAt = ({ points }) => points[0][0] <= stops[at] && stops[at] <= points.at(-1)[0];
    const entries = drawn.filter(isAt).map(line => {
      const raw = format(nearest(line.points, stops[at])[1]), soft = format(nearest(line.smooth, stops[at])[1]);
      return [line, `${line.name}: ${raw}${smoothing ? ` (${text("smoothedValue", soft)})` : ""}`];
    });
    const epoch = text("epoch", stops[at].toFixed(2).replace(/\.?0+$/, ""));
    values.replaceChildren(make("li", epoch), ...entries.map(([line, words]) => {
      const item = make("li", words), patch = make("span", undefined, { class: "patch" });
      patch.style.backgroundColor = line.color;
      item.prepend(patch);
      return item;
    }));
    svg.setAttribute("aria-valuenow", stops[at]);
    svg.setAttribute("aria-valuetext", [epoch, ...entries.map(([, words]) => words)].join(", "));
  }
  svg.setAttribute("aria-valuenow", stops[at]);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) * WIDTH / box.width;
    const value = xLow + (xHigh - xLow) * (place - LEFT) / (WIDTH - LEFT - RIGHT);
    read(stops.indexOf(nearest(stops.map(stop => [stop]), value)[0]));
  });
  svg.addEventListener("keydown", event => {
    const moved = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: stops.length - 1 }[event.key];
    if (moved === undefined) return;
    event.preventDefault();
    read(moved);
  });
  place.replaceChildren(svg, values);
}
