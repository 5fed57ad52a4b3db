// Every head of a stack, three times: before, after, and what changed.

import { atlas } from "./atlas.js";
import { legend, straightScale } from "./colour.js";
import { choice, make, measure, menu } from "./dom.js";

const LEAST = 1e-4; // of the largest number: a statistic of which no head changes by more is left out

// Two Recordings as stacks for `differences`: those that both have, with the same layers and heads.
export async function paired(before, after) {
  const found = [];
  for (const [i, { name, layers, heads, sites, variables }] of before.stacks.entries()) {
    const j = after.stacks.findIndex((stack) => stack.name === name), twin = after.stacks[j];
    if (!twin || String(twin.layers) !== String(layers) || String(twin.heads) !== String(heads)) continue;
    const one = { name: name.replaceAll("_", " "), layers, heads, sites, variables: [] };
    for (const variable of variables) {
      const other = twin.variables.find((of) => of.name === variable.name);
      for (const [r, role] of (other ? variable.roles ?? [null] : []).entries()) {
        const s = role === null ? 0 : (other.roles ?? []).indexOf(role);
        if (s < 0) continue;
        const sides = [await before.samples[i][0].heads(variable, r), await after.samples[j][0].heads(other, s)];
        const [size, change] = [sides.flatMap((rows) => rows.flatMap((row) => Array.from(row))),
          sides[0].flatMap((row, l) => Array.from(row, (x, h) => sides[1][l][h] - x))].map((values) =>
          Math.max(0, ...values.filter(Number.isFinite).map(Math.abs)));
        if (!(change > LEAST * size)) continue;
        one.variables.push({ label: role === null ? variable.label : `${variable.label}: ${role}`, units: variable.units,
          about: variable.about, before: sides[0], after: sides[1], share: change / size });
      }
    }
    one.variables.sort((a, b) => b.share - a.share);
    found.push(one);
  }
  return found;
}

// stacks: [{name, layers, heads, sites?, variables: [{label, units, about, before, after, share}]}], numbers [layer][head]
// or null, the most changed variable first. none: what to say where there are none. Handle: redraw().
export function differences(element, stacks, none) {
  const state = { stack: 0, variable: 0, layer: -1, head: -1 };
  if (!stacks.some(({ variables }) => variables.length)) {
    element.replaceChildren(make("p", { class: "lead" }, none ?? (stacks.length ? "No head: every statistic is as it was, on the same tokens."
      : "The two have no stack of the same layers and heads.")));
    return { redraw() {} };
  }
  const body = make("div", {}), readout = make("p", { class: "readout", "aria-live": "polite" }), tools = make("div", { class: "stacks" });
  element.replaceChildren(tools, readout, body);
  let draw = () => {};

  function build() {
    const { layers, heads, sites, variables } = stacks[state.stack];
    const pick = stacks.length > 1 ? choice("Stack", stacks.map(({ name, variables: some }, i) => ({ value: i, label: name,
      disabled: !some.length, title: some.length ? null : "No head of this stack changes" })), state.stack, (stack) => {
      Object.assign(state, { stack, variable: 0, layer: -1, head: -1 });
      build();
    }).element : null;
    tools.replaceChildren(...[pick, menu("Statistic", variables.map(({ label }, i) => ({ value: i, label })), state.variable,
      (variable) => { state.variable = variable; draw(); })].filter(Boolean));
    const boxes = ["before", "after", "change"].map((title) => make("div", {}, make("h3", {}, title)));
    body.replaceChildren(make("div", { class: "atlases" }, ...boxes));
    const say = (l, h) => {
      const { before, after, ...variable } = variables[state.variable], known = l !== null && l >= 0;
      const [layer, head] = known ? [l, h] : [state.layer, state.head], a = before[layer][head], b = after[layer][head];
      const moved = b - a;
      readout.textContent = `layer ${layers[layer]}, head ${heads[head]}: ${measure(a, variable)} → ${measure(b, variable)}`
        + ` (${moved > 0 ? "+" : moved < 0 ? "−" : ""}${measure(Math.abs(moved), variable)})`;
    };
    const grids = boxes.map((box) => atlas(box, { layers, heads, sites },
      { choose: (layer, head) => { Object.assign(state, { layer, head }); draw(); }, look: say }));
    const keys = boxes.map((box) => box.appendChild(make("div", {})));

    draw = () => {
      const { before, after, ...variable } = variables[state.variable];
      const number = (rows) => rows.map((row) => Array.from(row, (value) => value ?? NaN));
      const sides = [number(before), number(after)];
      const moved = sides[1].map((row, l) => row.map((value, h) => value - sides[0][l][h]));
      if (state.layer < 0) {
        let most = -1;
        moved.forEach((row, l) => row.forEach((value, h) => {
          if (Math.abs(value) > most) {
            most = Math.abs(value);
            Object.assign(state, { layer: l, head: h });
          }
        }));
      }
      const both = straightScale(sides.flat(2)), end = Math.max(...moved.flat().filter(Number.isFinite).map(Math.abs), 1e-12);
      // Symmetric, so that no change is the paper's own colour.
      const change = { kind: "two", low: -end, high: end, most: end, clipped: false,
        at: (value) => 0.5 + value / (2 * end), value: (at) => (2 * at - 1) * end };
      const words = (values) => (l, h) => `layer ${layers[l]}, head ${heads[h]}: ${measure(values[l][h], variable)}`;
      [[sides[0], both], [sides[1], both], [moved, change]].forEach(([values, scale], i) => {
        grids[i].show({ values, scale, words: words(values), layer: state.layer, head: state.head });
        keys[i].replaceChildren(legend(scale, (value) => measure(value, variable), i === 2 ? variable.about : ""));
      });
      say(null);
    };
    draw();
  }
  state.stack = stacks.reduce((best, { variables }, i) =>
    ((variables[0]?.share ?? 0) > (stacks[best].variables[0]?.share ?? 0) ? i : best), 0);
  build();
  return { redraw: () => draw() };
}
