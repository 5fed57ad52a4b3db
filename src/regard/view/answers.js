// What a model gave, before and after: texts with their differences, bars of what was likeliest, pictures.

import { make, percent, quote, visible } from "./dom.js";

// before, after: pieces of a text, [words, whether they stand in this one alone].
export function texts({ before, after }) {
  const side = (name, pieces) => make("div", {}, make("h3", {}, name), make("p", { class: `said ${name}` },
    ...(pieces.length ? pieces.map(([words, own]) => (own ? make("mark", {}, words) : words)) : [make("span", { class: "note" }, "nothing")])));
  return make("div", {}, make("div", { class: "answers texts" }, side("before", before), side("after", after)),
    before.some(([, own]) => own) || after.some(([, own]) => own) ? null : make("p", { class: "note" }, "The same text, word for word."));
}

// rows: [{label, before, after}] or [{label, share}], shares of one; `words` names what they are of.
export function bars(rows, words) {
  const sides = rows.some((row) => "before" in row) ? ["before", "after"] : ["share"];
  const most = Math.max(1e-9, ...rows.flatMap((row) => sides.map((side) => row[side])));
  const first = (side) => rows.reduce((best, row) => (row[side] > best[side] ? row : best), rows[0]);
  const chosen = new Set(sides.map(first));
  const bar = (row, side) => {
    const filled = make("i", { class: side === "before" ? "before" : "after" });
    filled.style.width = `${(100 * row[side]) / most}%`;
    return filled;
  };
  const head = sides.length === 1 ? null : make("thead", {}, make("tr", {}, make("th", { scope: "col" }, words), make("td", {}),
    ...sides.map((side) => make("th", { scope: "col", class: "number" }, make("span", { class: `swatch ${side}` }), side))));
  return make("table", { class: "bars", "aria-label": words }, head, make("tbody", {}, ...rows.map((row) =>
    make("tr", {}, make("th", { scope: "row", title: row.label, class: chosen.has(row) ? "chosen" : null }, make("bdi", {}, visible(row.label))),
      make("td", { class: "track", "aria-hidden": "true" }, ...sides.map((side) => bar(row, side))),
      ...sides.map((side) => make("td", { class: "number" }, percent(row[side])))))));
}

// How likely the next tokens were, at the step where texts part: {at, before: the text up to it, changed, rows: [token, before, after]}.
export function parting({ at, before, changed, rows }) {
  const likeliest = (side) => rows.reduce((best, row) => (row[side] > best[side] ? row : best), rows[0])[0];
  const lead = changed ? `Token ${at + 1} is the first that differs: ${quote(likeliest(2))} in place of ${quote(likeliest(1))}.`
    : `No token differs. Probabilities move most at token ${at + 1}.`;
  return make("div", { class: "parting" }, make("p", { class: "lead" }, lead),
    make("p", { class: "said note" }, before ? `… ${before} ▁` : "At the very beginning: ▁"),
    bars(rows.map(([label, a, b]) => ({ label, before: a, after: b })), "Next token"));
}

// views: [{title, before, after | null, apart | null}], of each {source, width, height}.
export function pictures(views) {
  const one = ({ source, width, height }, words) =>
    make("figure", {}, make("img", { src: source, width, height, alt: words }), make("figcaption", {}, words));
  return make("div", {}, ...views.flatMap(({ title, before, after, apart }) => [title ? make("h3", { class: "prompt" }, title) : null,
    make("div", { class: "views" }, one(before, after ? "before" : "before and after: the same"), after ? one(after, "after") : null,
      apart ? one(apart, "where they differ") : null)].filter(Boolean)));
}
