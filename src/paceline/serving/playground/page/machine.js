// What this machine can do with the model: the roofline of formats, and a table of their speeds.

import { byId, make } from "./dom.js";
import { mark } from "./drawing.js";

const HEIGHT = 150;
const EDGE = { left: 44, right: 12, top: 12, bottom: 26 };
const POINTS = 40; // of the line
const MEGABYTE = 1e6;

/** Draw what the server says of its machine. */
export function showMachine(picture) {
  byId("machine").hidden = false;
  byId("machine-chosen").textContent = picture.chosen
    ? `The plan for this machine: ${picture.chosen}.`
    : "There is no plan for this machine yet; paceline plan makes one.";
  const rows = picture.formats.filter((row) => row.speed !== null || row.chosen);
  byId("machine-table").tBodies[0].replaceChildren(...rows.map(line));
  roofline(byId("roofline"), picture);
}

function line({ format, bytes, roofline: most, speed, passes, chosen }) {
  const cells = [
    `${Math.round(bytes / MEGABYTE).toLocaleString("en")} MB`,
    speed === null ? "–" : Math.round(speed).toLocaleString("en"),
    speed === null ? "–" : `${Math.round((100 * speed) / most)} %`,
    passes["8"] === undefined ? "–" : passes["8"].toFixed(2),
  ];
  return make(
    "tr",
    {},
    make("th", { scope: "row" }, chosen ? `${format} (plan)` : format),
    ...cells.map((text) => make("td", {}, text)),
  );
}

function roofline(svg, { bandwidth, formats }) {
  const across = Math.max(svg.clientWidth, 240);
  const sizes = formats.map((row) => row.bytes / MEGABYTE);
  const low = Math.min(...sizes);
  const high = Math.max(...sizes, 1.01 * low);
  const most = Math.max(...formats.map((row) => Math.max(row.roofline, row.speed ?? 0)));
  const x = (value) => EDGE.left + (value / high) * (across - EDGE.left - EDGE.right);
  const y = (value) => HEIGHT - EDGE.bottom - (value / most) * (HEIGHT - EDGE.top - EDGE.bottom);
  const points = Array.from({ length: POINTS + 1 }, (_, index) => {
    const size = low + ((high - low) * index) / POINTS;
    return `${x(size).toFixed(1)},${y(bandwidth / (size * MEGABYTE)).toFixed(1)}`;
  });
  const label = (at, value) => mark("text", { x: EDGE.left - 7, y: at + 4, "text-anchor": "end" }, value);
  svg.setAttribute("viewBox", `0 0 ${across} ${HEIGHT}`);
  svg.replaceChildren(
    mark("line", { class: "grid", x1: EDGE.left, x2: across - EDGE.right, y1: y(0), y2: y(0) }),
    label(y(0), "0"),
    label(y(most), Math.round(most).toLocaleString("en")),
    mark("text", { x: x(low), y: HEIGHT - 8, "text-anchor": "middle" }, `${Math.round(low)} MB`),
    mark("text", { x: x(high), y: HEIGHT - 8, "text-anchor": "end" }, `${Math.round(high)} MB`),
    mark("polyline", { class: "line roof", points: points.join(" ") }),
    ...formats.map((row) => dot(row, x(row.bytes / MEGABYTE), y(row.speed ?? row.roofline))),
  );
}

function dot({ format, speed, chosen }, cx, cy) {
  const css = speed === null ? "format hollow" : "format";
  const said = speed === null ? "not measured" : `${Math.round(speed)} tokens a second`;
  return mark("circle", { class: css, cx, cy, r: chosen ? 6 : 3.5 }, mark("title", {}, `${format}: ${said}`));
}
