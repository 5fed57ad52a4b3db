// Edit by hand: a picture is named by neighbours whose patches are like its own; which patches count, and what they
// correspond to, is dragged, and the vote changes as the arithmetic says.

import { bars } from "./answers.js";
import { make, number, panel, percent } from "./dom.js";
import { upload } from "./wire.js";

const SIDE = 100, GAP = 24; // of a picture in the drawing

// ask(path, body, heard) runs a job. Handle: element, open().
export function editing(ask) {
  const state = { item: 0, upload: null, mask: new Set(), moved: [], near: 0, held: null, cursor: 0, aim: 0 };
  let told = null;
  const svg = make("svg", { class: "by-hand", viewBox: `0 0 ${2 * SIDE + GAP} ${SIDE}`, tabindex: "0", role: "application",
    "aria-label": "The picture, left, and a neighbour, right: arrow keys move, Space lets a patch count, Enter takes a patch and puts it on another, Escape drops it" });
  const near = make("div", { class: "thumbs", role: "group", "aria-label": "Neighbours, the nearest first" });
  const readout = make("p", { class: "readout", "aria-live": "polite" }), votes = make("div", {}), lead = make("p", { class: "lead", "aria-live": "polite" });
  const patch = (i, n) => `row ${1 + Math.floor(i / n)}, column ${1 + (i % n)}`;
  const corner = (i, right) => {
    const size = SIDE / told.grid;
    return [(right ? SIDE + GAP : 0) + (i % told.grid) * size, Math.floor(i / told.grid) * size, size];
  };
  const run = () => ask("/api/jobs/edit", { item: state.item, upload: state.upload, mask: [...state.mask], moved: state.moved }, (name, what) => {
    if (name === "edited") { told = what; draw(); }
  }).catch(() => {});

  const square = (i, right, name) => {
    const [x, y, size] = corner(i, right);
    return make("rect", { x, y, width: size, height: size, class: name });
  };
  const line = (from, to, name) => {
    const [[x0, y0, size], [x1, y1]] = [corner(from, false), Array.isArray(to) ? to : corner(to, true).map((x) => x)];
    const half = size / 2, end = Array.isArray(to) ? [x1, y1] : [x1 + half, y1 + half];
    return make("path", { d: `M${x0 + half} ${y0 + half}L${end[0]} ${end[1]}`, class: name });
  };
  function draw(pointer = null) {
    const one = told.neighbours[state.near], edited = new Set(state.moved.filter(([of]) => of === state.near).map(([, from]) => from));
    const picture = (source, x) => make("image", { href: source, x, y: 0, width: SIDE, height: SIDE });
    const shown = [...new Set([...one.best, ...edited])];
    svg.replaceChildren(picture(told.picture, 0), picture(one.picture, SIDE + GAP),
      ...[...state.mask].map((i) => square(i, false, "counts")),
      ...shown.flatMap((i) => {
        const name = edited.has(i) ? "tie edited" : one.best.includes(i) ? "tie" : "tie idle";
        return [square(i, false, name), square(one.own[i], true, name), line(i, one.own[i], name)];
      }),
      state.held !== null ? square(state.held, false, "held") : "", state.held !== null && pointer ? line(state.held, pointer, "tie edited") : "",
      document.activeElement === svg ? square(state.held === null ? state.cursor : state.aim, state.held !== null, "cursor") : "");
    near.replaceChildren(...told.neighbours.map(({ picture: source, label, score, votes: does }, i) => make("button", { type: "button",
      "aria-pressed": String(i === state.near), class: does ? "" : "idle", onclick: () => { state.near = i; draw(); near.children[i].focus(); } },
    make("img", { src: source, alt: "" }), make("span", {}, label), make("span", { class: "share-of" }, does ? number(score) : "no vote"))));
    const rows = told.names.map((label, i) => ({ label, before: told.votes[0][i] / told.voters, after: told.votes[1][i] / told.voters }));
    votes.replaceChildren(bars(rows, "Votes"));
    const [before, after] = told.answers;
    lead.textContent = `${before === after ? `It is named ${after}` : `It was named ${before}, and is named ${after} now`}${told.truth ? `; it is a ${told.truth}` : ", after its neighbours alone"}. `
      + `${told.voters} of the nearest vote. ${state.mask.size ? `${state.mask.size} patches count, chosen by hand.` : "The five most alike of the attention’s patches count."}`;
    if (!pointer) readout.textContent = `Neighbour ${state.near + 1}, a ${one.label}: score ${number(one.score)}. Yellow: what counts, and what it corresponds to; drag from a patch on the left to one on the right.`;
  }
  function toggle(i) {
    if (!state.mask.delete(i)) state.mask.add(i);
    run();
  }
  function tie(from, to) {
    state.moved = [...state.moved.filter(([of, patch_]) => of !== state.near || patch_ !== from), [state.near, from, to]];
    run();
  }
  const at = (event) => {
    const box = svg.getBoundingClientRect(), scale = (2 * SIDE + GAP) / box.width, n = told.grid;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale], right = x > SIDE + GAP / 2;
    const column = Math.floor(((x - (right ? SIDE + GAP : 0)) / SIDE) * n), row = Math.floor((y / SIDE) * n);
    const inside = column >= 0 && column < n && row >= 0 && row < n;
    return { right, i: inside ? row * n + column : null, point: [x, y] };
  };
  svg.addEventListener("pointerdown", (event) => {
    if (!told) return;
    const { right, i } = at(event);
    if (right || i === null) return;
    state.held = state.cursor = i;
    svg.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  svg.addEventListener("pointermove", (event) => {
    if (!told) return;
    const { right, i, point } = at(event), one = told.neighbours[state.near];
    if (state.held !== null && svg.hasPointerCapture(event.pointerId)) draw(point);
    if (i === null) return;
    readout.textContent = right ? `Neighbour’s patch at ${patch(i, told.grid)}`
      : `Patch at ${patch(i, told.grid)}: ${percent(one.similarity[i])} like the neighbour’s at ${patch(one.own[i], told.grid)}`;
  });
  svg.addEventListener("pointerup", (event) => {
    if (!told || state.held === null) return;
    const { right, i } = at(event), from = state.held;
    state.held = null;
    if (right && i !== null) tie(from, i);
    else if (i === from) toggle(i);
    else draw();
  });
  svg.addEventListener("keydown", (event) => {
    if (!told) return;
    const n = told.grid, which = state.held === null ? "cursor" : "aim", step = { ArrowUp: -n, ArrowDown: n, ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      const next = state[which] + step;
      if (next >= 0 && next < n * n && (Math.abs(step) > 1 || Math.floor(next / n) === Math.floor(state[which] / n))) state[which] = next;
      draw();
    } else if (event.key === " ") toggle(state.cursor);
    else if (event.key === "Escape") { state.held = null; draw(); }
    else if (event.key !== "Enter") return;
    else if (state.held === null) {
      state.held = state.cursor;
      state.aim = told.neighbours[state.near].own[state.cursor];
      draw();
    } else {
      const from = state.held;
      state.held = null;
      tie(from, state.aim);
    }
    event.preventDefault();
  });
  for (const name of ["focus", "blur"]) svg.addEventListener(name, () => told && draw());

  const fresh = (item, own = null) => {
    Object.assign(state, { item, upload: own, mask: new Set(), moved: [], near: 0, held: null });
    if (!own) file.value = "";
    run();
  };
  const file = make("input", { type: "file", accept: "image/*", "aria-label": "A picture of your own" });
  file.addEventListener("change", async () => {
    if (!file.files[0]) return;
    try { fresh(state.item, (await upload(file.files[0])).id); } catch (error) { lead.textContent = error.message; }
  });
  const button = (label, act) => make("button", { type: "button", class: "quiet-button", onclick: act }, label);
  const one = panel("by-hand-card", "Named by what corresponds", make("p", { class: "lead" },
    "A classifier that names a picture by its neighbours: those vote whose patches are most like the picture’s. Click a patch on the left to let only chosen ones count; drag one to a patch of the neighbour to say what it corresponds to."),
  make("div", { class: "ask" }, make("div", { class: "row" }, button("Another picture", () => fresh((state.item + 1) % 800)), button("Undo the edits", () => fresh(state.item, state.upload)),
    make("label", { class: "labelled" }, make("span", {}, "Your own"), file))));
  one.element.append(make("div", { class: "split even" }, make("div", {}, svg, readout, near), make("div", {}, lead, votes)));
  return { element: one.element, open() { if (!told) fresh(0); } };
}
