// What a prediction rests on: two methods of attribution side by side, over words or a map of the pixels.

import { paint, ramp } from "./colour.js";
import { make, menu, number, visible } from "./dom.js";

// found: {method, target, score, words, values} or {method, target, score, map}. The strongest colour is the largest score.
export function scored({ method, target, score, words, values, map }) {
  const flat = map ? map.flat() : values, most = Math.max(1e-12, ...flat.map(Math.abs));
  const title = make("h3", {}, `${method.replaceAll("_", " ")}: ${target} (logit ${number(score)})`);
  if (map) {
    const canvas = make("canvas", { width: map[0].length, height: map.length, class: "score-map", role: "img", "aria-label": `Scores of ${method} over the picture` });
    const context = canvas.getContext("2d"), image = context.createImageData(map[0].length, map.length), colours = ramp("two");
    flat.forEach((value, i) => image.data.set([...colours[Math.round(127.5 * (1 + value / most))], 255], 4 * i));
    context.putImageData(image, 0, 0);
    return make("div", {}, title, canvas);
  }
  return make("div", {}, title, make("p", { class: "scored" }, ...words.map((word, i) => {
    const span = make("span", { title: `${visible(word)}: ${values[i].toPrecision(3)}` }, word.replace(/^[Ġ▁]/, " "));
    if (Math.abs(values[i]) > 0.02 * most) {
      const { fill, ink } = paint(0.5 * (1 + values[i] / most), "two");
      span.style.background = fill;
      span.style.color = ink;
    }
    return span;
  })));
}

// methods: names; ask({methods, target}, heard) runs it. Handle: element.
export function explaining(methods, ask) {
  const chosen = ["integrated_gradients", "gradient_x_input"].map((name, i) => (methods.includes(name) ? name : methods[i]));
  const target = make("input", { "aria-label": "Class or token to explain", placeholder: "the model’s own" });
  const box = make("div", { class: "answers" }), key = make("p", { class: "note" });
  const pick = (label, i) => menu(label, [...(i ? [{ value: "", label: "none" }] : []), ...methods.map((value) => ({ value, label: value }))], chosen[i],
    (value) => { chosen[i] = value; });
  const go = make("button", { type: "button", class: "quiet-button", onclick: async () => {
    go.disabled = true;
    box.replaceChildren();
    key.textContent = "";
    await ask({ methods: chosen.filter(Boolean), target: target.value.trim() || null }, (found) => {
      box.append(scored(found));
      key.textContent = "Blue speaks for it, orange against it; the strongest colour is the method’s largest score.";
    }).catch(() => {});
    go.disabled = false;
  } }, "Explain");
  return { element: make("div", { class: "ask" }, make("div", { class: "row" }, pick("Method", 0), pick("beside", 1),
    make("label", { class: "labelled" }, "Of", target), go), box, key) };
}
