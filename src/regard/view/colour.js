// Colour ramps of even lightness (so that they survive colour blindness and grey printing), and scales onto them.

import { make } from "./dom.js";

// [lightness, chroma, hue] in OKLCH. The first stop is close to the paper: nothing is drawn as nothing.
const RAMPS = {
  light: [[0.985, 0.006, 100], [0.93, 0.05, 160], [0.79, 0.09, 195], [0.58, 0.115, 245], [0.33, 0.13, 280]],
  dark: [[0.235, 0.012, 265], [0.36, 0.085, 275], [0.53, 0.115, 245], [0.76, 0.11, 190], [0.96, 0.07, 105]],
};
const TWO_SIDED = {
  light: [[0.42, 0.12, 45], [0.72, 0.11, 60], [0.985, 0.004, 100], [0.68, 0.1, 240], [0.36, 0.13, 275]],
  dark: [[0.88, 0.1, 75], [0.62, 0.12, 50], [0.235, 0.012, 265], [0.6, 0.11, 245], [0.9, 0.07, 215]],
};
// For drawing over a picture, in either theme: from ink to light.
const HEAT = [[0.2, 0.06, 290], [0.42, 0.17, 320], [0.62, 0.2, 20], [0.8, 0.16, 65], [0.97, 0.08, 105]];

function bytes([lightness, chroma, hue]) {
  const a = chroma * Math.cos((hue * Math.PI) / 180), b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s].map((x) => {
    const y = x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055;
    return Math.round(255 * Math.min(1, Math.max(0, y)));
  });
}

function table(stops) {
  return Array.from({ length: 256 }, (_, i) => {
    const x = (i / 255) * (stops.length - 1), at = Math.min(Math.floor(x), stops.length - 2), f = x - at;
    // Hues are mixed along the shorter way round.
    return bytes(stops[at].map((low, j) => {
      let step = stops[at + 1][j] - low;
      if (j === 2 && Math.abs(step) > 180) step -= Math.sign(step) * 360;
      return low + f * step;
    }));
  });
}

const tables = {};
let ground = "light"; // the theme in force
export const setTheme = (name) => { ground = name; };

// 256 [red, green, blue] of the theme in force.
export function ramp(kind = "one") {
  const stops = kind === "heat" ? HEAT : (kind === "two" ? TWO_SIDED : RAMPS)[ground];
  return (tables[kind + (kind === "heat" ? "" : ground)] ??= table(stops));
}

export const SAME = 5e-3; // relative: numbers closer than this are called the same

const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);

// Fill and the ink that reads on it: the better of black and white is never below 4.5 to 1.
export function paint(position, kind = "one") {
  const colour = ramp(kind)[Math.round(255 * Math.min(1, Math.max(0, position)))];
  return { fill: css(colour), ink: luminance(colour) > 0.179 ? "#0b0b0c" : "#fff" };
}

// A role of a token has one colour, in every report.
export const roleHue = (role) => `var(--role-${/^[a-z]+$/.test(role ?? "") ? role : "other"}, var(--role-other))`;

function quantile(sorted, q) {
  const x = q * (sorted.length - 1), low = Math.floor(x);
  return sorted[low] + (x - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

const finite = (values) => Float64Array.from(values).filter(Number.isFinite).sort();

// Scale for weights on tokens: square root, from 0 up to the 97th percentile (or a quarter of the most) of the ordinary
// ones, so that one sink does not wash out the rest, and at least to four times their mean, so that an even spread looks
// even, not strong. What is above is drawn in the last colour and marked. Nothing is above `limit`, 1 of shares.
export function shadeScale(values, ordinary = null, limit = Infinity) {
  const all = finite(values);
  const some = ordinary ? finite(Array.from(values).filter((_, i) => ordinary[i])) : all;
  const most = all.length ? all[all.length - 1] : 0;
  const base = some.length >= 8 ? some : all;
  const mean = base.reduce((sum, x) => sum + x, 0) / (base.length || 1);
  const wide = base.length ? Math.max(quantile(base, 0.97), base[base.length - 1] / 4, most / 50, 4 * mean) : 0;
  const high = Math.min(wide, Math.max(limit, most));
  return { kind: "one", low: 0, high: high || 1, most, clipped: most > high * 1.001,
    at: (value) => Math.sqrt(Math.max(0, value) / (high || 1)), value: (at) => at * at * (high || 1) };
}

// Scale for numbers of heads: straight, from the lowest to the highest; symmetric about 0 where both signs occur. One
// head far above all others (twice the 98th percentile) ends the scale early instead of greying the rest.
export function straightScale(values) {
  const all = finite(values);
  if (!all.length) return { kind: "one", low: 0, high: 1, most: 1, clipped: false, at: () => 0, value: (at) => at };
  const [least, most] = [all[0], all[all.length - 1]];
  if (least < 0 && most > 0) {
    const end = Math.max(-least, most);
    return { kind: "two", low: -end, high: end, most, clipped: false,
      at: (value) => 0.5 + value / (2 * end), value: (at) => (2 * at - 1) * end };
  }
  const end = quantile(all, 0.98), high = end > 0 && most > 2 * end ? end : most;
  // Rounding is not a difference.
  const span = high - least > SAME * Math.abs(high) ? high - least : Infinity;
  return { kind: "one", low: least, high, most, clipped: most > high,
    flat: span === Infinity, at: (value) => (value - least) / span,
    value: (at) => (span === Infinity ? high : least + at * span) };
}

// A bar of the ramp with its numbers.
export function legend(scale, format, words) {
  const canvas = make("canvas", { width: 256, height: 1, "aria-hidden": "true" });
  const context = canvas.getContext("2d"), strip = context.createImageData(256, 1);
  ramp(scale.kind).forEach((colour, i) => strip.data.set([...colour, 255], 4 * i));
  context.putImageData(strip, 0, 0);
  const ticks = [0, 0.5, 1].map((at) =>
    make("span", {}, (at === 1 && scale.clipped ? "≥ " : "") + format(scale.value(at))));
  return make("div", { class: "legend" },
    make("div", { class: "legend-bar" }, canvas, make("div", { class: "ticks" }, ...ticks)), make("p", {}, words));
}
