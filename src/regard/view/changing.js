// The list of steps of a change, in order, and what adds to it: heads that are clicked, tokens, the catalog's forms.

import { atlas } from "./atlas.js";
import { straightScale } from "./colour.js";
import { make, menu, visible } from "./dom.js";

export function said(step) {
  if (step.kind === "heads") {
    return step.heads.map(([l, h, f]) => `${f === 0 ? "mute" : `× ${f}`} layer ${l}, head ${h}`).join("; ");
  }
  if (step.kind === "attention") {
    const to = step.names ?? step.keys.join(", "), from = step.queries ? ` from ${step.queries.join(", ")}` : "";
    const where = step.layers ? `, layer ${step.layers.join(", ")}${step.heads ? ` head ${step.heads.join(", ")}` : ""}` : "";
    return `${step.factor === 0 ? "cut" : `× ${step.factor}`} attention to ${to}${from}${where}`;
  }
  const knobs = Object.entries(step.knobs).map(([name, value]) => `${name}=${value}`).join(", ");
  return step.key + (knobs ? ` (${knobs})` : "");
}

// Positions out of "3, 5-9"; null where it is empty; throws where it is neither.
export function positions(words) {
  if (!words.trim()) return null;
  return words.split(",").flatMap((part) => {
    const found = /^\s*(\d+)\s*(?:-\s*(\d+)\s*)?$/.exec(part);
    if (!found) throw new Error(`‘${part.trim()}’ is no position: give numbers such as 3, 5-9`);
    const [from, to] = [Number(found[1]), Number(found[2] ?? found[1])];
    if (to < from || to - from > 100000) throw new Error(`‘${part.trim()}’ is no range`);
    return Array.from({ length: to - from + 1 }, (_, i) => from + i);
  });
}

// stack: the recorded stack that is looked at; forms: the catalog's interventions; at(): {layer, head, token} of the
// views, in the recording's labels, token {position, token} or null. events: changed(steps), failed(words).
// Handle: steps, stacked(stack), refresh().
export function changing(element, forms, at, events) {
  const steps = [], list = make("ol", { class: "steps", "aria-label": "Steps, in order" });
  const box = make("div", {}), readout = make("p", { class: "readout", "aria-live": "polite" });
  const factor = make("input", { type: "number", step: "0.1", value: "0", "aria-label": "Factor of heads that are clicked" });
  let stack = null, grid = null;

  function draw() {
    list.replaceChildren(...steps.map((step, i) => {
      const box = make("input", { type: "checkbox", "aria-label": `Step ${i + 1} is on`,
        onchange: () => { step.on = box.checked; changed(); } });
      box.checked = step.on;
      const move = (by) => { steps.splice(i + by, 0, ...steps.splice(i, 1)); changed(); };
      return make("li", { class: step.on ? "" : "off" }, box, make("span", {}, said(step)),
        i ? make("button", { type: "button", "aria-label": `Step ${i + 1} earlier`, onclick: () => move(-1) }, "↑") : null,
        make("button", { type: "button", "aria-label": `Remove step ${i + 1}`, onclick: () => { steps.splice(i, 1); changed(); } }, "✕"));
    }));
    if (!steps.length) list.append(make("li", { class: "note" }, "No step yet: click a head below, choose a token, or add an intervention."));
    shade();
  }
  const factorOf = (layer, head) => {
    let found = 1;
    for (const step of steps) {
      if (step.kind !== "heads" || step.stack !== stack.name) continue;
      for (const [l, h, f] of step.heads) if (l === layer && h === head) found = f;
    }
    return found;
  };
  function shade() {
    if (!grid) return;
    const values = stack.layers.map((l) => stack.heads.map((h) => factorOf(l, h) - 1));
    const most = Math.max(1, ...values.flat().map(Math.abs));
    const words = (l, h) => {
      const f = factorOf(stack.layers[l], stack.heads[h]);
      return `Layer ${stack.layers[l]}, head ${stack.heads[h]}: ${f === 1 ? "as it is" : f === 0 ? "muted" : `× ${f}`}`;
    };
    grid.words = words;
    grid.view.show({ values, scale: straightScale([...values.flat(), -most, most]), words, layer: -1, head: -1 });
  }
  function changed() { draw(); events.changed(steps); }
  function add(step) { steps.push({ on: true, ...step }); changed(); }

  function toggle(l, h) {
    const layer = stack.layers[l], head = stack.heads[h], value = Number(factor.value);
    if (!Number.isFinite(value) || value === 1) { events.failed("A head is scaled by a number other than 1; 0 mutes it."); return; }
    const mine = steps.find((step) => step.kind === "heads" && step.stack === stack.name);
    const there = mine?.heads.findIndex(([a, b]) => a === layer && b === head) ?? -1;
    if (there >= 0 && mine.heads[there][2] === value) mine.heads.splice(there, 1);
    else if (there >= 0) mine.heads[there][2] = value;
    else if (mine) mine.heads.push([layer, head, value]);
    else { add({ kind: "heads", stack: stack.name, heads: [[layer, head, value]] }); return; }
    if (!mine.heads.length) steps.splice(steps.indexOf(mine), 1);
    changed();
  }

  // What flows between tokens.
  const keys = make("input", { placeholder: "such as 3, 5-9", "aria-label": "Keys: positions" });
  const queries = make("input", { placeholder: "all", "aria-label": "Queries: positions" });
  const weight = make("input", { type: "number", step: "0.5", min: "0", value: "0", "aria-label": "Factor of attention" });
  const here = menu("Where", [{ value: "all", label: "every layer" }, { value: "layer", label: "this layer" }, { value: "head", label: "this head" }],
    "all", () => {});
  const take = (input) => make("button", { type: "button", class: "quiet-button", onclick: () => {
    const { token } = at();
    if (!token) { events.failed("Choose a token in the text or a patch in the picture first."); return; }
    input.value = input.value.trim() ? `${input.value}, ${token.position}` : String(token.position);
  } }, "Add the chosen token");
  const flow = make("details", {}, make("summary", {}, "What flows between tokens"),
    make("div", { class: "form" },
      make("label", {}, "Looked at (keys)", keys), take(keys), make("label", {}, "Who looks (queries)", queries), take(queries),
      make("label", {}, "Times; 0 cuts", weight), here,
      make("button", { type: "button", class: "quiet-button", onclick: () => {
        try {
          const chosen = positions(keys.value), from = positions(queries.value), { layer, head } = at();
          const where = here.querySelector("select").selectedIndex;
          if (!chosen) throw new Error("Name the keys: positions in the text, or add the chosen token.");
          add({ kind: "attention", stack: stack.name, keys: chosen, queries: from, factor: Number(weight.value),
            layers: where ? [layer] : null, heads: where === 2 ? [head] : null });
        } catch (error) { events.failed(error.message); }
      } }, "Add this step")));

  // The catalog's interventions.
  const form = make("div", { class: "form" });
  const pick = menu("Intervention", forms.map(({ key }) => ({ value: key, label: key })), forms[0]?.key, (key) => open(key));
  function open(key) {
    const method = forms.find((one) => one.key === key);
    const fields = method.knobs.map((knob) => {
      const input = knob.kind === "choice"
        ? make("select", {}, ...knob.words.map((word) => make("option", { selected: word === knob.default }, word)))
        : make("input", { value: knob.default, placeholder: "as the method finds", inputmode: knob.kind === "text" ? "text" : "decimal" });
      return { knob, input, element: make("label", {}, knob.name, input, knob.about ? make("small", {}, knob.about) : null) };
    });
    form.replaceChildren(make("p", { class: "note" }, make("b", {}, method.title), ` ${method.about}`), ...fields.map(({ element: one }) => one),
      make("button", { type: "button", class: "quiet-button", onclick: () => {
        const given = fields.filter(({ knob, input }) => input.value.trim() !== "" && input.value !== knob.default);
        add({ kind: "method", key, knobs: Object.fromEntries(given.map(({ knob, input }) => [knob.name, input.value.trim()])) });
      } }, `Add ${key}`));
  }
  if (forms.length) open(forms[0].key);
  const catalog = make("details", {}, make("summary", {}, "An intervention of the catalog"), make("div", { class: "form" }, pick), form);

  element.append(list, make("div", { class: "row" }, make("label", { class: "labelled" }, "A click on a head multiplies it by", factor)),
    box, readout, flow, catalog);

  return {
    steps,
    draw: shade,
    stacked(next) {
      if (stack === next) return;
      stack = next;
      box.replaceChildren();
      const say = (l, h) => { readout.textContent = l === null || l === undefined ? "Click a head to mute it; click it again to let it be." : grid.words(l, h); };
      grid = { view: atlas(box, { layers: stack.layers, heads: stack.heads, sites: stack.sites }, { choose: (l, h) => { toggle(l, h); say(l, h); }, look: say }) };
      say(null);
      draw();
    },
    clear() { steps.splice(0); draw(); },
    token: () => visible(at().token?.token ?? ""),
  };
}
