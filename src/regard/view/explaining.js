// What a prediction rests on: two methods of attribution side by side, over words or a picture, and what the prediction
// does as what they name is taken away, or put in, first.

import { chart } from "./chart.js";
import { paint, ramp } from "./colour.js";
import { make, menu, number, panel, percent, visible } from "./dom.js";
import { Places } from "./places.js";

const HUE = "var(--accent)", OTHER = "var(--soft)";

// Scores over a picture: what speaks for it, and against it, lies over the picture in grey, the stronger the denser.
function over({ map, picture }, most, name) {
  const [rows, columns] = [map.length, map[0].length];
  const canvas = make("canvas", { width: columns, height: rows, role: "img", "aria-label": `Scores of ${name} over the picture` });
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows), colours = ramp("two");
  map.flat().forEach((value, i) => {
    const share = value / most;
    image.data.set([...colours[Math.round(127.5 * (1 + share))], picture ? Math.round(235 * Math.min(1, Math.abs(share) ** 0.6)) : 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
  const frame = make("div", { class: "score-map" }, picture ? make("img", { src: picture.source, alt: "" }) : null, canvas);
  frame.style.aspectRatio = picture ? `${picture.width} / ${picture.height}` : `${columns} / ${rows}`;
  return frame;
}

// Words, each on the colour of its score.
const overWords = ({ words, values }, most) => make("p", { class: "scored" }, ...words.map((word, i) => {
  const span = make("span", { title: `${visible(word)}: ${values[i].toPrecision(3)}` }, word.replace(/^[Ġ▁]/, " "));
  if (Math.abs(values[i]) > 0.02 * most) {
    const { fill, ink } = paint(0.5 * (1 + values[i] / most), "two");
    span.style.background = fill;
    span.style.color = ink;
  }
  return span;
}));

// found: what the server tells of a method's scores. The strongest colour is its largest score.
function scored({ method, target, score, parts, notes }) {
  const most = Math.max(1e-12, ...parts.flatMap(({ map, values }) => (map ? map.flat() : values).map(Math.abs)));
  return make("div", { class: "explained", "data-method": method }, make("h3", {}, `${method.replaceAll("_", " ")}: ${target} (logit ${number(score)})`),
    ...parts.map((part) => (part.map ? over(part, most, method) : overWords(part, most))), ...notes.map((words) => make("p", { class: "note" }, words)));
}

// What the probability does as parts go, or come, the highest score first; beside the same scores elsewhere.
function judged(found) {
  const one = (name, title, better, kind) => {
    const own = found[`${name}_${kind}`], moved = found[`moved_${name}_${kind}`], all = moved.length;
    const beats = moved.filter((x) => (better === "lower" ? own < x : own > x)).length;
    return make("div", {}, chart({ title, up: "probability", across: "share of the input", format: { x: percent, y: percent }, lines: [
      { label: "the same scores elsewhere, mean", x: found.share, y: found[`moved_${name}`], hue: OTHER, dashed: true },
      { label: "this map", x: found.share, y: found[name], hue: HUE }] }),
    make("p", { class: "note" }, `Area ${number(own)}, elsewhere ${number(moved.reduce((a, b) => a + b, 0) / all)}: better than ${beats} of ${all}; ${better} is better.`));
  };
  return make("div", { class: "answers curves" }, one("deletion", "Taken away", "lower", "error"), one("insertion", "Put in", "higher", "score"));
}

// What was generated, token by token, of the first stack that has any.
function generated(recording) {
  for (const [i, stack] of recording.stacks.entries()) {
    const items = new Places(recording.samples[i][0], stack.kind === "cross").query.filter(({ role }) => role === "generated");
    if (items.length) return items.map(({ token }) => token);
  }
  return [];
}

// ask(path, body, heard) runs a job. Handle: element, of(recording, model, fresh): what is explained from now on.
export function explaining(ask) {
  const chosen = ["integrated_gradients", "gradient_x_input"], state = { word: null, target: "" };
  const which = make("div", { class: "word-choice", role: "group", "aria-label": "What is explained" }), picks = make("span", { class: "row" });
  const box = make("div", { class: "answers wide-answers", "aria-live": "polite" }), key = make("p", { class: "note" });
  const others = make("details", { hidden: true }, make("summary", {}, "Methods that do not fit, and why"), make("dl", {}));
  const target = make("input", { "aria-label": "Another token to explain", placeholder: "another token, as text", onchange: () => { state.target = target.value.trim(); } });
  let fresh = true;
  const asked = (methods) => ({ methods, word: state.word, target: state.target || null });
  const clear = () => { box.replaceChildren(); key.textContent = ""; };
  const go = make("button", { type: "button", class: "go", id: "explain", disabled: true, onclick: async () => {
    go.disabled = true;
    clear();
    const made = {};
    await ask("/api/jobs/explain", asked([...new Set(chosen.filter(Boolean))]), (name, found) => {
      if (name === "scores") {
        box.append(made[found.method] = scored(found));
        key.textContent = "Blue speaks for it, orange against it; the strongest colour is the method’s largest score.";
      }
      if (name === "curves") made[found.method].append(judged(found));
    }).catch(() => {});
    go.disabled = false;
  } }, "Explain");

  function menus(fits) {
    chosen.forEach((name, i) => { if (name && !fits.includes(name)) chosen[i] = fits[i] ?? ""; });
    const pick = (label, i) => menu(label, [...(i ? [{ value: "", label: "none" }] : []), ...fits.map((value) => ({ value, label: value.replaceAll("_", " ") }))],
      chosen[i], (value) => { chosen[i] = value; });
    picks.replaceChildren(pick("Method", 0), pick("beside", 1));
    go.disabled = !fits.length;
  }
  const one = panel("explain", "What it rests on", make("p", { class: "lead" },
    "Scores say what a prediction rests on, as a method has it. The curves ask the model: does it change its mind when what scores high is taken away first, sooner than when as much is taken elsewhere?"),
  make("div", { class: "ask" }, which, make("div", { class: "row" }, picks, go)), others);
  one.element.append(box, key);
  const empty = make("p", { class: "note" }, "Look at something first.");
  return {
    element: one.element,
    of(recording, model) {
      fresh = true;
      clear();
      Object.assign(state, { word: null, target: "" });
      target.value = "";
      const words = generated(recording);
      const button = (word, label) => make("button", { type: "button", "aria-pressed": String(state.word === word), onclick: (event) => {
        state.word = word;
        for (const other of which.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === event.currentTarget));
      } }, label);
      which.replaceChildren(make("span", { class: "note" }, "Of"), ...(words.length
        ? words.map((token, i) => button(i, visible(token)))
        : model.labels.length ? [] : [button(null, "the token it would write next")]),
      ...(model.labels.length ? [menu("class", [{ value: "", label: "the one it names" }, ...model.labels.map((label, i) => ({ value: String(i), label }))], "", (value) => { state.target = value; })]
        : words.length ? [] : [target]));
      if (words.length) which.querySelector("button").click();
    },
    // Once it is looked at: which methods fit.
    async open(recording) {
      if (!recording) { one.element.querySelector(".ask").before(empty); return; }
      empty.remove();
      if (!fresh) return;
      fresh = false;
      await ask("/api/jobs/methods", asked([]), (name, { fits, others: rest }) => {
        if (name !== "methods") return;
        menus(fits);
        others.hidden = false;
        others.querySelector("dl").replaceChildren(...Object.entries(rest).flatMap(([method, why]) => [make("dt", {}, method.replaceAll("_", " ")), make("dd", {}, why)]));
      }).catch(() => { fresh = true; });
    },
  };
}
