// Lines against a number, with axes that can be read.

import { make, number } from "./dom.js";

const WIDE = 300, HIGH = 130, LEFT = 46, BOTTOM = 32, TOP = 8, RIGHT = 8;

// lines: [{label, x: [], y: [], hue: a CSS colour, dashed?}]; band: {x, low, high}? behind them; format: {x, y}?.
export function chart({ title, lines, band = null, across, up, format = {} }) {
  const xs = lines.flatMap(({ x }) => x), ys = [...lines.flatMap(({ y }) => y), ...(band ? [...band.low, ...band.high] : [])];
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [Math.min(0, ...ys), Math.max(...ys, 1e-9)];
  const px = (x) => (LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDE - LEFT - RIGHT)).toFixed(1);
  const py = (y) => (HIGH - BOTTOM - ((y - y0) / (y1 - y0 || 1)) * (HIGH - BOTTOM - TOP)).toFixed(1);
  const words = (x, y, said, anchor) => make("text", { x, y, "text-anchor": anchor }, said);
  const said = { x: format.x ?? number, y: format.y ?? number };
  const svg = make("svg", { class: "chart", viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img",
    "aria-label": `${title}: ${lines.map(({ label, y }) => `${label} from ${said.y(y[0])} to ${said.y(y.at(-1))}`).join("; ")}` },
  make("path", { class: "frame", d: `M${LEFT} ${TOP}V${HIGH - BOTTOM}H${WIDE - RIGHT}` }),
  words(LEFT - 4, TOP + 8, said.y(y1), "end"), words(LEFT - 4, HIGH - BOTTOM, said.y(y0), "end"),
  words(LEFT, HIGH - BOTTOM + 13, said.x(x0), "start"), words(WIDE - RIGHT, HIGH - BOTTOM + 13, said.x(x1), "end"),
  words((LEFT + WIDE - RIGHT) / 2, HIGH - 6, across, "middle"));
  if (band) {
    const edge = (values) => band.x.map((x, i) => `${px(x)} ${py(values[i])}`);
    svg.append(make("path", { class: "band", d: `M${[...edge(band.low), ...edge(band.high).reverse()].join("L")}Z` }));
  }
  const keys = lines.map(({ label, x, y, hue, dashed }) => {
    const path = make("path", { class: dashed ? "curve dashed" : "curve", d: `M${x.map((at, i) => `${px(at)} ${py(y[i])}`).join("L")}` });
    path.style.stroke = hue;
    svg.append(path);
    const sign = make("i", { class: dashed ? "dashed" : "" });
    sign.style.borderColor = hue;
    return make("span", {}, sign, label);
  });
  return make("figure", { class: "chart-box" }, make("figcaption", {}, make("b", {}, title), ` ${up}`), svg, make("div", { class: "chart-keys", "aria-hidden": "true" }, ...keys));
}
