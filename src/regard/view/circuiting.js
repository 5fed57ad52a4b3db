// Circuits: what a clean and a corrupted prompt differ by, head by head, token by token, and along which paths.

import { atlas } from "./atlas.js";
import { chart } from "./chart.js";
import { legend, straightScale } from "./colour.js";
import { make, menu, number, panel, percent, visible } from "./dom.js";

const TASKS = ["induction", "ioi", "greater_than", "docstring"];
const DASHES = { query: "2 3", key: "8 4", value: "", answer: "12 3 2 3" }; // how a head acts on the next

const twoSided = (values) => {
  const end = Math.max(1e-9, ...values.filter(Number.isFinite).map(Math.abs));
  return straightScale([-end, end]);
};

// A grid of effects with its legend and what is pointed at.
function grid(data, values, words) {
  const box = make("div", {}), readout = make("p", { class: "readout", "aria-live": "polite" }), scale = twoSided(values.flat());
  let most = [0, 0];
  values.forEach((row, l) => row.forEach((x, h) => { if (Math.abs(x) > Math.abs(values[most[0]][most[1]] ?? 0)) most = [l, h]; }));
  const say = (l, h) => { readout.textContent = l === null || l === undefined ? `Most: ${words(...most)}` : words(l, h); };
  const view = atlas(box, data, { choose: say, look: say });
  const draw = () => view.show({ values: values.map((row) => row.map((x) => x ?? NaN)), scale, words, layer: -1, head: -1 });
  draw();
  say(null);
  const key = make("div", {}, legend(scale, percentOf, "Of the difference between the prompts, how much the corrupted output of this head makes by itself."));
  return { element: make("div", {}, readout, box, key), redraw() { draw(); } };
}

// Heads by layer, and the answer above them; lines as strong as what goes along them.
function graph({ nodes, answer, edges }) {
  const layers = [...new Set(nodes.map(([layer]) => layer))].sort((a, b) => a - b), high = 60 * (layers.length + 1);
  const place = new Map([[answer, [220, 28]]]);
  layers.forEach((layer, row) => {
    const members = nodes.filter(([of]) => of === layer).map(([, head]) => head).sort((a, b) => a - b);
    members.forEach((head, i) => place.set(`${layer}.${head}`, [(440 * (i + 1)) / (members.length + 1), high - 30 - 60 * row]));
  });
  const most = Math.max(...edges.map(({ weight }) => Math.abs(weight)), 1e-9);
  const lines = edges.map(({ start, end, weight, style }) => {
    const [[x0, y0], [x1, y1]] = [place.get(start), place.get(end)];
    const path = make("path", { d: `M${x0} ${y0}L${x1} ${y1}`, class: weight < 0 ? "edge against" : "edge", "stroke-dasharray": DASHES[style] });
    path.style.strokeWidth = 0.6 + (5 * Math.abs(weight)) / most;
    return path;
  });
  const named = [...place].map(([name, [x, y]]) => make("g", {}, make("rect", { x: x - 24, y: y - 12, width: 48, height: 24, rx: 6 }),
    make("text", { x, y: y + 4, "text-anchor": "middle" }, name)));
  const listed = [...edges].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, 12);
  return make("div", { class: "answers" },
    make("svg", { class: "graph", viewBox: `0 0 440 ${high}`, role: "img", "aria-label": `${nodes.length} heads and ${edges.length} paths between them to the answer` }, ...lines, ...named),
    make("table", { class: "among" }, make("tbody", {}, ...listed.map(({ start, end, weight, style }) => make("tr", {},
      make("th", { scope: "row" }, `${start} → ${end}${style === answer ? "" : `, as ${style}`}`), make("td", { class: "value" }, percentOf(weight)))))));
}
const percentOf = (x) => (x < 0 ? `−${percent(-x)}` : percent(x));

// model(): name of the model; ask(path, body, heard) runs a job. Handle: element, redraw().
export function circuiting(model, ask) {
  const area = (label, rows = "2") => make("textarea", { rows, "aria-label": label });
  const fields = { clean: area("Clean prompt"), corrupted: area("Corrupted prompt"),
    answer: make("input", { "aria-label": "Answer" }), wrong: make("input", { "aria-label": "Wrong answer" }) };
  const heads = make("input", { type: "number", min: "1", max: "24", value: "8", "aria-label": "Heads in the circuit" });
  const box = make("div", { class: "found-grid" });
  let shown = [], seed = 0, task = TASKS[0];
  const sample = make("button", { type: "button", class: "quiet-button", onclick: async () => {
    await ask("/api/jobs/example", { model: model(), task, seed: seed++ }, (name, what) => {
      if (name === "example") for (const [key, words] of Object.entries(what)) fields[key].value = words;
    }).catch(() => {});
  } }, "An example");
  const go = make("button", { type: "button", class: "go", id: "circuit", onclick: async () => {
    box.replaceChildren();
    shown = [];
    let words = null;
    const put = (title, note, ...what) => {
      const made = panel(what.some((part) => part.querySelector(".worded, .graph, .said")) ? "found wide" : "found", title, note ? make("p", { class: "lead" }, note) : null, ...what);
      box.append(made.element);
    };
    const kept = (one) => { shown.push(one); return one.element; };
    const body = Object.fromEntries(Object.entries(fields).map(([key, input]) => [key, input.value]));
    await ask("/api/jobs/circuit", { model: model(), heads: Number(heads.value) || 8, ...body }, (name, what) => {
      if (name === "contrast") {
        words = what.words;
        const line = (of, other) => make("p", { class: "said" }, ...of.map((word, i) => (word === other[i] ? word : make("mark", {}, word))));
        put("Both prompts", `${what.right ? "The model prefers the answer" : "The model does not prefer the answer"}: its logit is ${number(what.clean)} ahead of the wrong one’s, of the corrupted prompt ${number(what.corrupted)}.`,
          make("div", { class: "answers" }, make("div", { class: "said before" }, line(words[0], words[1])), make("div", { class: "said after" }, line(words[1], words[0]))));
      }
      if (name === "heads") {
        put("Every head", "Each head’s output is taken from the corrupted run, at all tokens: how far this alone moves the answer.",
          kept(grid({ layers: what.layers, heads: what.heads }, what.effect,
            (l, h) => `layer ${what.layers[l]}, head ${what.heads[h]}: ${percentOf(what.effect[l][h])}`)));
      }
      if (name === "patching") {
        const columns = what.tokens.map((token) => visible(words[0][token]));
        put("The strongest heads, token by token", "The same at one token at a time: where a head does it.",
          kept(grid({ layers: what.rows, heads: columns, axes: { label: "Heads down, tokens across", down: "head", across: "token" } }, what.effect,
            (l, h) => `head ${what.rows[l]} at ${columns[h]} (${what.tokens[h]}): ${percentOf(what.effect[l][h])}`)));
      }
      if (name === "faithfulness") {
        put("How many heads it takes", "How much of the answer so many heads make when all others are corrupted: 100% is as much as all of them.",
          chart({ title: "Faithfulness", up: "", across: "heads in the circuit", format: { x: String, y: percentOf }, band: { x: what.sizes, low: what.low, high: what.high },
            lines: [{ label: "these heads (grey: random ones)", x: what.sizes, y: what.ours, hue: "var(--accent)" }] }));
      }
      if (name === "paths") {
        put("The paths to the answer", "What a head gives on to the query, key or value of another, or to the answer itself, that carries a twentieth of the strongest or more. Dotted: as query; dashed: as key; whole: as value.",
          what.edges.length ? graph(what) : make("p", { class: "note" }, "No path carries anything."));
      }
    }).catch(() => {});
  } }, "Find");
  const labelled = (label, input) => make("label", { class: "stack-label" }, label, input);
  const one = panel("circuit", "Which heads do it", make("p", { class: "lead" },
    "Two prompts of as many tokens, which differ in what decides the answer. What heads give in the corrupted run is put into the clean one, and the difference between answer and wrong answer is watched."),
  make("div", { class: "ask" }, make("div", { class: "answers" }, labelled("Clean prompt", fields.clean), labelled("Corrupted prompt", fields.corrupted)),
    make("div", { class: "row" }, make("label", { class: "labelled" }, "Answer", fields.answer), make("label", { class: "labelled" }, "Wrong answer", fields.wrong),
      make("label", { class: "labelled" }, "Heads", heads)),
    make("div", { class: "row" }, menu("Task", TASKS.map((value) => ({ value, label: value.replaceAll("_", " ") })), task, (value) => { task = value; seed = 0; }), sample, go)));
  return { element: make("div", { class: "stacked" }, one.element, box), redraw() { shown.forEach((each) => each.redraw()); } };
}
