// The page of `regard steer`: next-token bars where texts part, and every head before, after, and what changed.

import { atlas } from "./atlas.js";
import { legend, straightScale } from "./colour.js";
import { choice, make, measure, menu, percent, quote, visible } from "./dom.js";
import { saveButtons } from "./save.js";
import { themed } from "./theme.js";

const given = JSON.parse(document.getElementById("header").textContent), drawn = document.getElementById("drawn");
const redraws = [];
themed(document.getElementById("theme"), () => redraws.forEach((redraw) => redraw()));

function panel(name, title, ...children) {
  const head = make("div", { class: "card-head" }, make("h2", {}, title));
  const element = make("section", { class: `card ${name}` }, head, ...children);
  head.append(saveButtons(element, name));
  drawn.append(element);
  return head;
}

// How likely the next tokens were, at the step where texts part.
function bars({ at, before, changed, rows }) {
  const top = (side) => rows.reduce((best, row) => (row[side] > best[side] ? row : best), rows[0])[0];
  const [first, then] = [top(1), top(2)], most = Math.max(...rows.flatMap(([, a, b]) => [a, b]), 1e-9);
  const bar = (when, share) => {
    const element = make("i", { class: when });
    element.style.width = `${(100 * share) / most}%`;
    return element;
  };
  const box = make("div", { class: "bars", role: "table", "aria-label": "Next tokens, before and after" });
  for (const [token, a, b] of rows) {
    box.append(make("bdi", { class: token === first || token === then ? "word chosen" : "word" }, visible(token)),
      make("div", { class: "pair-of", "aria-hidden": "true" }, bar("before", a), bar("after", b)),
      make("div", { class: "shares" }, make("span", {}, percent(a)), make("span", {}, percent(b))));
  }
  const lead = changed ? `Token ${at + 1} is the first that differs: ${quote(then)} in place of ${quote(first)}.`
    : `No token differs. Probabilities move most at token ${at + 1}.`;
  panel("steps", "What comes next", make("p", { class: "lead" }, lead),
    make("p", { class: "said note" }, before ? `… ${before} ▁` : "At the very beginning: ▁"),
    make("p", { class: "keys" }, make("span", {}, make("span", { class: "swatch before" }), "before"),
      make("span", {}, make("span", { class: "swatch after" }), "after")), box);
}

// Every head of a stack, three times.
function changes(stacks) {
  const state = { stack: 0, variable: 0, layer: -1, head: -1 };
  const body = make("div", {}), readout = make("p", { class: "readout", "aria-live": "polite" });
  const tools = make("div", { class: "stacks" });
  panel("changed", "What changes in the heads", tools, readout, body);

  function build() {
    const { layers, heads, variables } = stacks[state.stack];
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
    const grids = boxes.map((box) => atlas(box, { layers, heads },
      { choose: (layer, head) => { Object.assign(state, { layer, head }); draw(); }, look: say }));
    const keys = boxes.map((box) => box.appendChild(make("div", {})));

    function draw() {
      const { before, after, ...variable } = variables[state.variable];
      const number = (rows) => rows.map((row) => row.map((value) => (value === null ? NaN : value)));
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
      const change = { kind: "two", low: -end, high: end, most: end, clipped: false,
        at: (value) => 0.5 + value / (2 * end), value: (at) => (2 * at - 1) * end };
      const words = (values) => (l, h) => `layer ${layers[l]}, head ${heads[h]}: ${measure(values[l][h], variable)}`;
      [[sides[0], both], [sides[1], both], [moved, change]].forEach(([values, scale], i) => {
        grids[i].show({ values, scale, words: words(values), layer: state.layer, head: state.head });
        keys[i].replaceChildren(legend(scale, (value) => measure(value, variable), i === 2 ? variable.about : ""));
      });
      say(null);
    }
    redraws.splice(0, redraws.length, draw);
    draw();
  }
  state.stack = stacks.reduce((best, { variables }, i) =>
    ((variables[0]?.share ?? 0) > (stacks[best].variables[0]?.share ?? 0) ? i : best), 0);
  build();
}

if (given.step) bars(given.step);
if (given.stacks.some(({ variables }) => variables.length)) changes(given.stacks);
else panel("changed", "What changes in the heads", make("p", { class: "lead" }, given.stacks.length
  ? "No head: every statistic is as it was, on the same tokens."
  : "No head: what is changed is the choice among the next tokens, after the model has run."));
document.documentElement.dataset.drawn = Math.round(performance.now());
