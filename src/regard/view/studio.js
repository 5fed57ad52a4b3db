// The studio: what a model is given, what it does with it in the report's views, and what changes when one changes it.

import { bars, parting, pictures, texts } from "./answers.js";
import { editing } from "./byhand.js";
import { changing } from "./changing.js";
import { circuiting } from "./circuiting.js";
import { differences, paired } from "./differences.js";
import { choice, make, menu, panel } from "./dom.js";
import { explaining } from "./explaining.js";
import { explore } from "./explore.js";
import { gazing } from "./gazing.js";
import { papers } from "./papers.js";
import { Places } from "./places.js";
import { Recording } from "./recording.js";
import { card } from "./save.js";
import { themed } from "./theme.js";
import { get, inflated, job, post, upload } from "./wire.js";

const byId = (id) => document.getElementById(id);

async function opened(id) {
  const header = await get(`/api/recordings/${id}`);
  const recording = new Recording(header, (block) => inflated(`/api/recordings/${id}/blocks/${block}`));
  return { id, header, recording };
}

// What is looked at: the recording on the screen, the one that changes are made to, the model's description.
let views = null, base = null, shown = null, pair = null, heads = null, model = null, file = null, change = null, working = null;

// Look: what is given.
const text = make("textarea", { id: "text", "aria-label": "Text", rows: "4", maxlength: "400000" });
const hub = make("input", { "aria-label": "Hub id", placeholder: "or a hub id, owner/name", class: "wide" });
const generate = make("input", { type: "number", min: "0", max: "512", value: "12", "aria-label": "Tokens to generate" });
const fileInput = make("input", { type: "file", "aria-label": "Picture or sound" });
const fileSaid = make("span", { class: "note", "aria-live": "polite" });
const fileRow = make("div", { class: "row", hidden: true }, make("label", { class: "labelled" }, make("span", {}, "Picture"), fileInput), fileSaid);
const generateRow = make("label", { class: "labelled" }, "Tokens to generate", generate);
const turnsBox = make("div", { class: "ask", hidden: true });
let chatting = false;
const style = choice("Kind of input", [{ value: "text", label: "Text" }, { value: "chat", label: "Chat" }], "text", (value) => {
  chatting = value === "chat";
  style.show(value);
  turnsBox.hidden = addTurnButton.hidden = !chatting;
  text.hidden = chatting;
  if (chatting && !turnsBox.childElementCount) addTurn("user", text.value);
});
function addTurn(role, words = "") {
  const row = make("div", { class: "row turn-row" });
  row.append(menu("", ["system", "user", "assistant"].map((value) => ({ value, label: value })), role, () => {}),
    make("textarea", { class: "wide", rows: "2", "aria-label": "Turn" }),
    make("button", { type: "button", class: "quiet-button", "aria-label": "Remove this turn", onclick: () => row.remove() }, "✕"));
  row.querySelector("textarea").value = words;
  turnsBox.append(row);
}
const addTurnButton = make("button", { type: "button", class: "quiet-button", onclick: () => {
  const last = [...turnsBox.querySelectorAll("select")].at(-1)?.value;
  addTurn(last === "user" ? "assistant" : "user");
} }, "Add a turn");
const go = make("button", { type: "button", class: "go", id: "look", onclick: () => look() }, "Look");
const status = make("div", { class: "working", role: "status" });
const modelBox = make("span", {}), kept = make("ul", { class: "kept" });
const asking = panel("look", "What it is given",
  make("div", { class: "ask" }, make("div", { class: "row" }, modelBox, hub, style.element), text,
    turnsBox, fileRow, make("div", { class: "row" }, generateRow, go), status,
    make("details", {}, make("summary", {}, "Recordings"), kept)));

const answerBox = make("div", { "aria-live": "polite" }), answer = panel("gives", "What it gives", answerBox);
const changeBox = make("div", {}), changeStatus = make("div", { class: "working", role: "status" });
const wrong = make("p", { class: "notice strong", role: "alert", hidden: true });
const python = make("pre", { hidden: true, tabindex: "0", "aria-label": "The change as Python" });
const run = make("button", { type: "button", class: "go", id: "run", disabled: true, onclick: () => apply() }, "Run");
const atOnce = make("input", { type: "checkbox", checked: true, id: "at-once" });
const asPython = make("button", { type: "button", class: "quiet-button", disabled: true, onclick: async () => {
  try {
    python.textContent = (await post("/api/python", asked())).code;
    python.hidden = false;
  } catch (error) { fail(changeStatus, error); }
} }, "As Python");
const changeCard = panel("change", "Change it", changeBox, make("div", { class: "row" }, run,
  make("label", { class: "labelled" }, atOnce, "Run after each change"), asPython), wrong, changeStatus, python);
const differencesBox = make("div", {}), compared = make("div", { class: "stacked" });
const differencesCard = card("changed differences", "What changes in the heads", differencesBox);
const viewsBox = make("div", { id: "views" });
const which = make("div", { class: "row" });
byId("studio").append(make("div", { class: "split" }, asking.element, make("div", { class: "stacked" }, answer.element)),
  make("div", { class: "split", id: "changing", hidden: true }, make("div", { class: "stacked" }, changeCard.element), compared), which, viewsBox);

function fail(place, error) {
  place.classList.toggle("failed", !error.stopped);
  place.replaceChildren(error.message);
}

// Shows how far a job is, with a button that stops it. One job at a time is asked for; a newer one stops the older.
async function does(place, path, body, heard) {
  working?.stop();
  place.classList.remove("failed");
  const bar = make("progress", { "aria-label": "How far it is" }), words = make("span", {}, "Waiting…");
  const stop = make("button", { type: "button", class: "quiet-button", onclick: () => mine.stop() }, "Stop");
  place.replaceChildren(bar, words, stop);
  const mine = working = job(path, body, (name, what) => {
    if (working !== mine) return;
    if (name === "queued" && what.before) words.textContent = `Waiting for ${what.before} other job${what.before > 1 ? "s" : ""}`;
    if (name === "progress") {
      words.textContent = what.what;
      if (what.of) { bar.max = what.of; bar.value = what.done; }
    }
    heard(name, what);
  });
  try {
    const { seconds } = await mine.done;
    if (working === mine) place.replaceChildren(`Took ${seconds.toFixed(seconds < 1 ? 2 : 1)} s.`);
  } catch (error) {
    if (working === mine) fail(place, error);
    throw error;
  }
}

// What the views show: state's labels, and the chosen token.
function at() {
  const { stack, sample, layer, head, token } = views.state, recorded = shown.recording.stacks[stack];
  const places = new Places(shown.recording.samples[stack][sample], recorded.kind === "cross"), place = places.find(token);
  return { layer: recorded.layers[layer], head: recorded.heads[head], token: place ? places[place.side][place.i] : null };
}

function show(next, state = null) {
  shown = next;
  viewsBox.replaceChildren();
  const { header, recording } = next;
  const main = make("div", {});
  viewsBox.append(...header.notices.map((words) => make("p", { class: "notice", role: "note" }, words)), main);
  views = explore(main, recording, { changed: (now) => change.stacked(recording.stacks[now.stack]),
    drawn: () => { document.documentElement.dataset.drawn = next.id; } });
  const stack = header.start, [layer, head] = header.starts[stack];
  const kept = state && recording.stacks[state.stack]?.name === state.name && state.sample < recording.stacks[state.stack].samples;
  views.go(kept ? state : { stack, sample: 0, layer, head, token: null, scope: "head" });
  change.stacked(recording.stacks[views.state.stack]);
}
const remembered = () => (views ? { ...views.state, name: shown.recording.stacks[views.state.stack].name } : null);

function tell({ said, bars: rows, picture }) {
  const words = rows?.length && model?.takes.generate ? "The first token, by likelihood" : "Classes, by likelihood";
  answerBox.replaceChildren(...[said ? make("p", { class: "said" }, said) : null,
    picture ? make("img", { src: picture, alt: "What it painted" }) : null,
    rows?.length ? bars(rows, words) : null].filter(Boolean));
  if (!answerBox.childElementCount) answerBox.append(make("p", { class: "note" }, "It writes nothing and names no class: see where it looks below."));
}

function given() {
  const takes = model.takes, body = { model: model.name, generate: takes.generate ? Number(generate.value) || 0 : 0 };
  if (chatting && takes.chat) {
    body.turns = [...turnsBox.querySelectorAll(".turn-row")].map((row) => ({ role: row.querySelector("select").value, content: row.querySelector("textarea").value }));
  } else if (takes.text && text.value.trim()) body.text = text.value;
  if (file && (takes.picture || takes.sound)) body.upload = file.id;
  return body;
}

async function look() {
  go.disabled = true;
  let ready = null;
  try {
    await does(status, "/api/jobs/look", given(), (name, what) => {
      if (name === "said") {
        answerBox.replaceChildren(make("p", { class: "said live" }, what.text));
      }
      if (name === "page") {
        if (!what.partial) tell(what);
        ready = (ready ?? Promise.resolve()).then(async () => {
          const next = await opened(what.id).catch(() => null);
          if (next) show(next, remembered());
          if (next && !what.partial) based(next);
        });
      }
      if (name === "saved") list();
    });
    await ready;
  } catch { /* told */ }
  go.disabled = false;
}

function based(next) {
  base = next;
  pair = null;
  change.clear();
  python.hidden = true;
  compared.replaceChildren();
  which.replaceChildren();
  run.disabled = asPython.disabled = true;
  explainer.of(next.recording, model);
  byId("changing").hidden = false;
}

// Change.
const asked = () => ({ recording: base.id, steps: change.steps });
let soon = null;
async function apply() {
  if (!change.steps.some(({ on }) => on)) {
    compared.replaceChildren();
    which.replaceChildren();
    pair = null;
    if (shown !== base) show(base, remembered());
    return;
  }
  const from = base, began = performance.now();
  try {
    await does(changeStatus, "/api/jobs/change", asked(), async (name, what) => {
      if (name === "answer") {
        const parts = [what.views ? pictures(what.views) : null, what.said ? texts(what.said) : null,
          what.step ? parting(what.step) : null,
          what.bars ? bars(what.bars, what.kind === "class" ? "Class" : "Next token") : null];
        compared.replaceChildren(card("before-after", "Before and after", ...parts).element);
        document.documentElement.dataset.answered = String(Math.round(performance.now() - began));
      }
      if (name === "page" && !what.partial && from === base) {
        const next = await opened(what.id);
        pair = [base, next];
        compared.append(differencesCard.element);
        await drawDifferences();
        show(next, remembered());
        const sides = choice("Which is shown", [{ value: 0, label: "Before" }, { value: 1, label: "After" }], 1, (value) => {
          sides.show(value);
          show(pair[value], remembered());
        });
        which.replaceChildren(make("span", { class: "note" }, "The views below show "), sides.element);
      }
      if (name === "saved") list();
    });
  } catch { /* told */ }
}
const drawDifferences = async () => { heads = differences(differencesBox, await paired(pair[0].recording, pair[1].recording)); };

// Recordings, and two of them side by side.
async function list() {
  const found = await get("/api/recordings");
  const entry = (one, act) => make("li", {}, make("button", { type: "button", "data-id": one.id, "aria-current": String(shown?.id === one.id), onclick: () => act(one) },
    make("span", { class: "words" }, one.title || "(its own text)"), make("small", {}, `${one.model}${one.steps.length ? `, ${one.steps.length} step${one.steps.length > 1 ? "s" : ""}` : ""}`),
    make("small", {}, new Date(1000 * one.when).toLocaleString())));
  kept.replaceChildren(...(found.length ? found.map((one) => entry(one, async () => {
    if (one.model !== model?.name) await open(one.model);
    const next = await opened(one.id);
    tell({ said: one.said });
    if (one.given.text) text.value = one.given.text;
    show(next);
    based(next);
  })) : [make("li", { class: "note" }, "None yet.")]));
  return found;
}

let twins = null;
async function compare() {
  const found = await list(), box = make("div", {}), options = found.map((one) => ({ value: one.id,
    label: `${one.model}: ${one.title || "its own text"}${one.steps.length ? ` (${one.steps.length} steps)` : ""}, ${new Date(1000 * one.when).toLocaleTimeString()}` }));
  const chosen = [options[1]?.value ?? options[0]?.value, options[0]?.value];
  const draw = async () => {
    try {
      const [a, b] = await Promise.all(chosen.map(opened));
      twins = differences(box, await paired(a.recording, b.recording));
    } catch (error) { box.replaceChildren(make("p", { class: "notice strong" }, error.message)); }
  };
  const pick = (label, i) => menu(label, options, chosen[i], (value) => { chosen[i] = value; draw(); });
  byId("compare").replaceChildren(card("compare changed", "Two recordings, head by head", make("p", { class: "lead" },
    "Stacks are aligned by name, heads by layer and number; of each head, the second less the first."),
  ...(options.length ? [make("div", { class: "ask" }, pick("First", 0), pick("Second", 1)), box] : [make("p", { class: "note" }, "Look at something first.")])).element);
  if (options.length) await draw();
}

// The model: what it takes decides what is asked for.
async function open(name) {
  go.disabled = true;
  try {
    await does(status, "/api/jobs/open", { model: name }, (event, what) => { if (event === "model") model = what; });
    const { takes } = model;
    text.hidden = !takes.text || (chatting && takes.chat);
    text.placeholder = takes.paints ? "What is to be painted" : takes.picture ? "A question about the picture" : "A text; left empty, a paragraph of Regard’s own";
    style.element.hidden = !takes.chat;
    if (!takes.chat && chatting) { chatting = false; style.show("text"); turnsBox.hidden = addTurnButton.hidden = true; text.hidden = !takes.text; }
    fileRow.hidden = !takes.picture && !takes.sound;
    fileRow.querySelector("span").textContent = takes.sound ? "Sound (WAV)" : "Picture";
    fileInput.accept = takes.sound ? ".wav,audio/wav" : "image/*";
    generateRow.hidden = !takes.generate;
    go.textContent = takes.paints ? "Paint" : takes.sound ? "Listen" : "Look";
    file = null;
    fileInput.value = fileSaid.textContent = "";
    status.replaceChildren(`${model.kind}${model.sites ? `, ${model.sites} attention modules` : ""}.`);
    if (hub.value.trim() !== name) hub.value = "";
  } catch { hub.value = ""; } // it is told; the model that is looked at is the one before
  go.disabled = false;
}
fileInput.addEventListener("change", async () => {
  if (!fileInput.files.length) return;
  file = null;
  fileSaid.textContent = "…";
  try {
    file = await upload(fileInput.files[0]);
    fileSaid.textContent = file.kind === "sound" ? `${file.seconds} s` : `${file.width} × ${file.height} pixels`;
  } catch (error) { fileSaid.textContent = error.message; }
});
hub.addEventListener("change", () => { if (hub.value.trim()) open(hub.value.trim()); });

// Tabs. What explains, and the like, is of the recording that changes are made to.
const statusOf = (part) => {
  const place = make("div", { class: "working", role: "status" });
  part.element.querySelector(".ask").after(place);
  return place;
};
const explainer = explaining((path, body, heard) => does(explainStatus, path, { recording: base.id, ...body }, heard));
const explainStatus = statusOf(explainer);
const circuits = circuiting(() => model.name, (...what) => does(circuitStatus, ...what)), circuitStatus = statusOf(circuits);
byId("explain-tab").append(explainer.element);
byId("circuits-tab").append(circuits.element);
const gaze = gazing(() => base, (...what) => does(gazeStatus, ...what)), gazeStatus = statusOf(gaze);
byId("gaze-tab").append(gaze.element);
const hand = editing((...what) => does(handStatus, ...what)), handStatus = statusOf(hand);
byId("hand-tab").append(hand.element);
const parts = { studio: "Look and change", "explain-tab": "Explain", "circuits-tab": "Circuits", "gaze-tab": "Gaze", "hand-tab": "By hand", compare: "Compare", papers: "Papers" };
const opens = {
  papers: () => { if (!byId("papers").childElementCount) papers(byId("papers")); },
  compare,
  "hand-tab": () => hand.open(),
  "explain-tab": () => explainer.open(base),
};
const tabs = choice("Parts of the studio", Object.entries(parts).map(([value, label]) => ({ value, label })), "studio", (value) => {
  tabs.show(value);
  for (const part of Object.keys(parts)) byId(part).hidden = part !== value;
  opens[value]?.();
});
byId("tabs").append(tabs.element);

themed(byId("theme"), () => { views?.redraw(); change?.draw(); heads?.redraw(); twins?.redraw(); circuits.redraw(); gaze.redraw(); });
turnsBox.after(addTurnButton);
addTurnButton.hidden = true;
const [{ models, start }, forms] = await Promise.all(["models", "interventions"].map((of) => get(`/api/${of}`)));
change = changing(changeBox, forms, at, { failed: (words) => { wrong.hidden = false; wrong.textContent = words; }, changed: (steps) => {
  wrong.hidden = true;
  run.disabled = asPython.disabled = !steps.some(({ on }) => on);
  python.hidden = true;
  clearTimeout(soon);
  if (atOnce.checked) soon = setTimeout(apply, 0);
} });
modelBox.append(menu("Model", models.map((value) => ({ value, label: value })), start, (value) => open(value)));
list();
await open(start);
document.documentElement.dataset.ready = "true";
