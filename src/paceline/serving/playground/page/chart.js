// Tokens over seconds, a line for each run.

import { mark } from "./drawing.js";

const HEIGHT = 132;
const EDGE = { left: 40, right: 12, top: 10, bottom: 24 };

/** Draw runs, [[name, css, record], ...], into `svg`. */
export function chart(svg, runs) {
  const shown = runs.filter(([, , record]) => record && record.passes.length > 1);
  const across = Math.max(svg.clientWidth, 240);
  svg.setAttribute("viewBox", `0 0 ${across} ${HEIGHT}`);
  svg.replaceChildren();
  if (!shown.length) return;
  const curves = shown.map(([, , record]) => record.curve);
  const seconds = Math.max(...curves.map((curve) => curve.at(-1)[0]), 1e-6);
  const tokens = Math.max(...curves.map((curve) => curve.at(-1)[1]), 1);
  const x = (value) => EDGE.left + (value / seconds) * (across - EDGE.left - EDGE.right);
  const y = (value) => HEIGHT - EDGE.bottom - (value / tokens) * (HEIGHT - EDGE.top - EDGE.bottom);
  const [x1, x2] = [EDGE.left, across - EDGE.right];
  for (const tick of ticks(tokens, 4)) {
    svg.append(
      mark("line", { class: "grid", x1, x2, y1: y(tick), y2: y(tick) }),
      mark("text", { x: EDGE.left - 7, y: y(tick) + 4, "text-anchor": "end" }, String(tick)),
    );
  }
  for (const tick of ticks(seconds, Math.min(6, across / 90)).slice(1)) {
    const label = seconds < 1 ? `${+(tick * 1000).toFixed(3)} ms` : `${+tick.toFixed(3)} s`;
    const anchor = tick > 0.93 * seconds ? "end" : "middle";
    svg.append(mark("text", { x: x(tick), y: HEIGHT - 6, "text-anchor": anchor }, label));
  }
  shown.forEach(([, css], index) => {
    const points = curves[index].map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`);
    const [a, b] = curves[index].at(-1);
    svg.append(
      mark("polyline", { class: `line ${css}`, points: points.join(" ") }),
      mark("circle", { class: `end ${css}`, cx: x(a), cy: y(b), r: 3.5 }),
    );
  });
  const speeds = shown.map(([name, , { speed }]) => `${name}: ${Math.round(speed)}`);
  svg.setAttribute("aria-label", `Tokens a second. ${speeds.join("; ")}`);
}

/** Return round numbers from 0 to `end`, about `count` of them. */
function ticks(end, count) {
  const scale = 10 ** Math.floor(Math.log10(end / count));
  const step = [1, 2, 5, 10].map((k) => k * scale).find((each) => end / each <= count);
  return Array.from({ length: Math.floor(end / step + 1e-9) + 1 }, (_, index) => index * step);
}
