// Gaze: where people looked, drawn in time over the picture, beside the model's maps and how well they tell it.

import { atlas } from "./atlas.js";
import { legend, paint, ramp, straightScale } from "./colour.js";
import { choice, make, menu, number, panel } from "./dom.js";
import { keep } from "./wire.js";

const calm = matchMedia("(prefers-reduced-motion: reduce)");

// Words, each on the colour of its number, 0 to 1.
const shaded = (words, values) => make("p", { class: "scored" }, ...words.flatMap((word, i) => {
  const span = make("span", {}, word), { fill, ink } = paint(Math.sqrt(values[i]));
  if (values[i] > 0.005) Object.assign(span.style, { background: fill, color: ink });
  return [span, " "];
}));

// A trial's words: how long each was looked at until `now` ms, the present one marked. Handle: element, show(trial, now).
function reading(words) {
  const box = make("div", {});
  return {
    element: box,
    show({ places, durations, starts }, now) {
      const time = new Float64Array(words.length);
      let present = -1;
      places.forEach((word, i) => {
        const spent = Math.min(Math.max(0, now - starts[i]), durations[i]);
        time[word] += spent;
        if (now >= starts[i] && now < starts[i] + durations[i]) present = word;
      });
      const longest = new Float64Array(words.length);
      places.forEach((word, i) => { longest[word] += durations[i]; });
      const most = longest.reduce((a, b) => Math.max(a, b), 1);
      box.replaceChildren(shaded(words, time.map((x) => x / most)));
      if (present >= 0) box.querySelectorAll("span")[present].classList.add("present");
    },
  };
}

function heat({ map }, { source, width, height }, name) {
  const [rows, columns] = [map.length, map[0].length];
  const canvas = make("canvas", { width: columns, height: rows, role: "img", "aria-label": `Map: ${name}` });
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows), colours = ramp("heat");
  map.flat().forEach((value, i) => image.data.set([...colours[Math.round(255 * Math.max(0, value))], 175], 4 * i));
  context.putImageData(image, 0, 0);
  const frame = make("div", { class: "score-map" }, make("img", { src: source, alt: "" }), canvas);
  frame.style.aspectRatio = `${width} / ${height}`;
  return frame;
}

// A trial's fixations: those until `now` ms, the present one in another colour. Handle: element, show(trial, now).
function path({ source, width, height }) {
  const svg = make("svg", { class: "scanpath", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Fixations in order" });
  const frame = make("div", { class: "gaze-frame" }, make("img", { src: source, alt: "The picture" }), svg);
  frame.style.aspectRatio = `${width} / ${height}`;
  return {
    element: frame,
    show({ places, durations, starts }, now) {
      const until = starts.filter((start) => start <= now).length, unit = 0.02 * Math.max(width, height);
      const mean = durations.reduce((a, b) => a + b, 0) / durations.length || 1;
      const clip = (x) => Math.min(1, Math.max(0, x));
      const at = places.slice(0, until).map(([x, y]) => [clip(x) * width, clip(y) * height]);
      const line = make("path", { class: "saccades", d: at.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("") });
      const under = line.cloneNode();
      under.setAttribute("class", "saccades under");
      svg.replaceChildren(under, line, ...at.flatMap(([x, y], i) => {
        const [px, py] = places[i], outside = px < 0 || px > 1 || py < 0 || py > 1;
        const present = i === until - 1 && now < starts[i] + durations[i];
        const r = unit * Math.sqrt(Math.min(4, Math.max(0.3, durations[i] / mean)));
        const words = make("text", { x, y: y + r * 0.38, "text-anchor": "middle", "font-size": r * 1.05 }, String(i + 1));
        return [make("circle", { cx: x, cy: y, r, class: [present ? "present" : "", outside ? "outside" : ""].join(" ") }), words];
      }));
      svg.setAttribute("aria-label", `${until} of ${places.length} fixations, at ${Math.round(now)} ms`);
    },
  };
}

// base(): what is looked at, {id}, or null; ask(path, body, heard) runs a job. Handle: element, redraw().
export function gazing(base, ask) {
  const file = make("input", { type: "file", accept: ".csv,.tsv,.txt,.asc", "aria-label": "File of fixations" });
  const size = ["Width", "Height"].map((word) => make("input", { type: "number", min: "1", placeholder: "picture’s", "aria-label": `${word} of the screen in pixels` }));
  const box = make("div", { class: "stacked" }), state = { placed: null, stimulus: null, upload: null };
  let redraw = () => {}, playing = 0;
  const wrong = (error) => box.replaceChildren(make("p", { class: "notice strong", role: "alert" }, error.message));
  const placed = menu("The picture stood", [{ value: null, label: "as large as the screen" }, { value: "centre", label: "in its middle" },
    { value: "fit", label: "as large as goes" }, { value: "fill", label: "in its shape" }], null, (value) => { state.placed = value; });

  function drawn(told) {
    const { trials, picture, words, summary, beside, stimuli = [], stimulus } = told, view = words ? reading(words) : path(picture);
    let at = 0, now = Infinity;
    const end = () => Math.max(...trials[at].starts.map((start, i) => start + trials[at].durations[i]), 1);
    const slider = make("input", { type: "range", min: "0", step: "any", class: "wide", "aria-label": "Time in ms", oninput: () => { stop(); to(Number(slider.value)); } });
    const clock = make("output", {}), play = make("button", { type: "button", class: "quiet-button", onclick: () => (playing ? stop() : start()) }, "Play");
    const to = (time) => {
      now = Math.min(time, end());
      slider.max = end();
      slider.value = now;
      clock.textContent = `${(now / 1000).toFixed(2)} of ${(end() / 1000).toFixed(2)} s`;
      view.show(trials[at], now);
    };
    function stop() {
      cancelAnimationFrame(playing);
      playing = 0;
      play.textContent = "Play";
    }
    function start() {
      let last = performance.now();
      if (now >= end()) now = 0;
      play.textContent = "Stop";
      const step = (time) => {
        to(now + (time - last));
        last = time;
        if (now >= end() || !view.element.isConnected) stop();
        else playing = requestAnimationFrame(step);
      };
      playing = requestAnimationFrame(step);
    }
    const made = panel("gazed", "Where people looked", make("div", { class: "row" },
      stimuli.length > 1 ? menu("Picture", stimuli.map((value) => ({ value, label: value })), stimulus, (value) => { state.stimulus = value; go.click(); }) : null,
      menu("Trial", trials.map(({ subject, trial, places }, i) => ({ value: i, label: `${subject}${trial ? `, ${trial}` : ""} (${places.length})` })), 0, (value) => { stop(); at = value; to(Infinity); })),
    view.element, make("div", { class: "row" }, play, slider, clock),
    make("p", { class: "note" }, `${summary.join(". ")}.${beside ? ` ${beside} fixations lie beside the picture and do not count.` : ""}`));
    const right = make("div", { class: "stacked" });
    box.replaceChildren(make("div", { class: "pair" }, made.element, right));
    if (calm.matches) to(Infinity);
    else { to(0); start(); }
    return right;
  }

  function judged(right, { picture, words: read }, { maps, heads, notes }) {
    const said = notes.map((words) => make("p", { class: "note" }, words));
    if (!maps.length) { right.replaceChildren(panel("maps", "The model’s map", ...said).element); return; }
    const named = maps.filter(({ name }) => !Array.isArray(name)), of = (l, h) => maps.find(({ name }) => Array.isArray(name) && name[0] === l && name[1] === h);
    const shown = make("div", {}), words = make("table", { class: "among" });
    const title = ({ name }) => (Array.isArray(name) ? `layer ${name[0]}, head ${name[1]}` : name.replaceAll("_", " "));
    let chosen = null;
    const show = (one) => {
      chosen = one;
      shown.replaceChildren(make("h3", {}, title(one)), read ? shaded(read, one.map) : heat(one, picture, title(one)));
      const scores = Object.entries(one.scores);
      words.replaceChildren(make("tbody", {}, ...scores.map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name.replaceAll("_", " ")),
        make("td", { class: "value" }, number(value))))));
      pick.show(Array.isArray(one.name) ? null : one.name);
      draw();
    };
    const pick = choice("Map", named.map((one) => ({ value: one.name, label: title(one) })), null, (value) => show(named.find(({ name }) => name === value)));
    const grid = make("div", {}), readout = make("p", { class: "readout", "aria-live": "polite" }), values = heads.map((row) => row.map((x) => x ?? NaN));
    const scale = straightScale(values.flat());
    const say = (l, h) => `layer ${l}, head ${h}: ${read ? "rank correlation" : "nss"} ${number(values[l][h])}`;
    let best = [0, 0];
    values.forEach((row, l) => row.forEach((x, h) => { if (x > (values[best[0]][best[1]] || -Infinity)) best = [l, h]; }));
    const view = atlas(grid, { layers: heads.map((_, l) => l), heads: heads[0].map((_, h) => h) },
      { choose: (l, h) => { if (of(l, h)) show(of(l, h)); }, look: (l, h) => { readout.textContent = l === null ? `Best: ${say(...best)}` : say(l, h); } });
    const key = make("div", {});
    const draw = () => {
      const [layer, head] = Array.isArray(chosen?.name) ? chosen.name : [-1, -1];
      view.show({ values, scale, words: say, layer, head });
      key.replaceChildren(legend(scale, number, read ? "Rank correlation of what each word receives from this head with how long it was looked at." : "nss of each head’s map: how many standard deviations above its mean it is where people looked. 0 is chance."));
    };
    right.replaceChildren(panel("maps", "The model’s map", make("p", { class: "lead" },
        read ? "Of a head, the attention that each word receives, over what even attention would give it; beside it what the model did not expect."
        : "Of a head, the weights of the class token on the patches. nss, auc judd and cc are better when higher, kl when lower."),
    make("div", { class: "row" }, pick.element), make("div", { class: "answers" }, shown, make("div", {}, words, readout, grid, key)), ...said).element);
    redraw = draw;
    show(of(...best) ?? named[0]);
    readout.textContent = `Best: ${say(...best)}`;
  }

  const go = make("button", { type: "button", class: "go", id: "gaze", onclick: async () => {
    if (!base()) { wrong(new Error("Look at a picture or a text first.")); return; }
    if (!state.upload) { wrong(new Error("Choose a file of fixations.")); return; }
    const sides = size.map(({ value }) => Number(value)), screen = sides.every(Boolean) ? sides : null;
    let right = null, of = null;
    cancelAnimationFrame(playing);
    playing = 0;
    await ask("/api/jobs/gaze", { recording: base().id, upload: state.upload, stimulus: state.stimulus, placed: state.placed, screen }, (name, what) => {
      if (name === "gaze" || name === "reading") { right = drawn(what); of = what; }
      if (name === "maps") judged(right, of, what);
    }).catch(() => {});
  } }, "Show");
  file.addEventListener("change", async () => {
    if (!file.files.length) return;
    state.stimulus = null;
    try {
      state.upload = (await keep(file.files[0])).id;
      if (base()) go.click();
    } catch (error) { wrong(error); }
  });
  const one = panel("gaze", "Where people look, and the model", make("p", { class: "lead" },
    "A table of fixations (CSV, TSV, a fixation report, EyeLink’s .asc) on the picture that was looked at: columns x and y, and if there are any subject, stimulus, duration, start. On a text: a table with a column word, its number."),
  make("div", { class: "ask" }, make("div", { class: "row" }, make("label", { class: "labelled" }, "Fixations", file),
    make("span", { class: "labelled" }, "Screen", ...size), placed, go)));
  return { element: make("div", { class: "stacked" }, one.element, box), redraw() { redraw(); } };
}
