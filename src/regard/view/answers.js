// What a model gave, before and after: texts with their differences, bars of what was likeliest, pictures.

import { make, percent, visible } from "./dom.js";

// runs: [{kind: "equal" | ..., before, after}].
export function texts(runs) {
  const side = (name, tag) => make("p", { class: "answer", "data-side": name }, ...runs.map((run) => {
    if (run.kind === "equal" || !run[name]) return run[name];
    return make(tag, {}, run[name]);
  }));
  return make("div", { class: "sides" },
    make("div", {}, make("h3", {}, "Before"), side("before", "del")),
    make("div", {}, make("h3", {}, "After"), side("after", "ins")));
}

// rows: [{label, before?, after?, share?}], shares of one; `words` names what they are of.
export function bars(rows, words) {
  const two = rows.some((row) => "before" in row);
  const most = Math.max(1e-9, ...rows.map((row) => Math.max(row.share ?? 0, row.before ?? 0, row.after ?? 0)));
  const bar = (share, name) => {
    const filled = make("i", { class: name });
    filled.style.width = `${(100 * share) / most}%`;
    return filled;
  };
  const cell = (share) => make("td", { class: "number" }, percent(share));
  const head = two ? make("thead", {}, make("tr", {}, make("th", {}, words), make("th", {}), make("th", {}, "before"),
    make("th", {}, "after"))) : null;
  return make("table", { class: "bars", "aria-label": words }, head, make("tbody", {}, ...rows.map((row) =>
    make("tr", {}, make("th", { scope: "row", title: row.label }, visible(row.label)),
      make("td", { class: "track", "aria-hidden": "true" }, ...(two
        ? [bar(row.before, "before"), bar(row.after, "after")] : [bar(row.share, "after")])),
      ...(two ? [cell(row.before), cell(row.after)] : [cell(row.share)])))));
}

export function pictures({ before, after, change }) {
  const side = (name, source) => make("div", {}, make("h3", {}, name), make("img", { src: source, alt: `The picture ${name.toLowerCase()}` }));
  return make("div", {}, make("div", { class: "sides" }, side("Before", before), side("After", after)),
    make("p", { class: "note" }, change ? `The pictures differ by ${percent(change)} of the range, on average.` : "Nothing changed."));
}
