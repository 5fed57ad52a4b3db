// The page of `regard steer`: texts and pictures beside each other, and every head before, after, and what changed.

import { bars, parting, pictures, texts } from "./answers.js";
import { differences } from "./differences.js";
import { make } from "./dom.js";
import { card } from "./save.js";
import { themed } from "./theme.js";

const { paints, asked, views, said, step, classes, stacks } = JSON.parse(document.getElementById("header").textContent);
const drawn = document.getElementById("drawn"), first = make("div", { class: "sides" });
let heads = null;
themed(document.getElementById("theme"), () => heads?.redraw());

const put = (into, ...what) => {
  const { element } = card(...what);
  into.append(element);
};
drawn.append(first);
if (views.length) put(first, "pictured", paints ? "What it paints" : "What it sees", pictures(views));
if (said) put(first, "spoken", "What it says", asked ? make("p", { class: "lead" }, `Asked: ${asked}`) : null, texts(said));
if (views.length === 1 && !views[0].after && said) first.classList.add("top");
if (classes.length) put(first, "classes", "What it takes it for", bars(classes, "Class"));
if (step) put(drawn, "steps", "What comes next", parting(step));
const box = make("div", {});
put(drawn, "changed", "What changes in the heads", box);
heads = differences(box, stacks, stacks.length ? null
  : "No head: what is changed is the choice among the next tokens, after the model has run.");
document.documentElement.dataset.drawn = Math.round(performance.now());
