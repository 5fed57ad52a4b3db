// The papers: search, what each row says of itself, and its claim run here.

import { make } from "./dom.js";
import { get, job } from "./wire.js";

export async function papers(element) {
  const search = make("input", { type: "search", class: "wide", placeholder: "Search the papers, such as sinks, hallucination, pruning", "aria-label": "Search the papers" });
  const list = make("ul", { class: "paper-list" }), shown = make("section", { class: "card paper" }, make("p", { class: "note" }, "Choose a paper."));
  const count = make("p", { class: "note", "aria-live": "polite" });
  element.replaceChildren(make("div", { class: "split" },
    make("section", { class: "card" }, make("div", { class: "card-head" }, make("h2", {}, "Papers")), make("div", { class: "ask" }, search, count), list), shown));
  let turn = 0, running = null;

  async function look() {
    const ticket = ++turn, found = await get(`/api/papers?words=${encodeURIComponent(search.value)}`);
    if (ticket !== turn) return;
    count.textContent = `${found.length} paper${found.length === 1 ? "" : "s"}`;
    list.replaceChildren(...found.map((row) => make("li", {}, make("button", { type: "button", "data-key": row.key, onclick: () => open(row.key) },
      make("span", {}, row.title), make("small", {}, `${row.key} · ${row.room} · ${row.status}`)))));
  }
  search.addEventListener("input", () => look());

  async function open(key) {
    for (const one of list.querySelectorAll("button")) one.setAttribute("aria-current", String(one.dataset.key === key));
    show(await get(`/api/papers/${encodeURIComponent(key)}`));
  }
  function show(row) {
    const state = make("div", { class: "working", role: "status" });
    const stop = make("button", { type: "button", class: "quiet-button", hidden: true, onclick: () => running?.stop() }, "Stop");
    const run = make("button", { type: "button", class: "go", hidden: !row.claim, onclick: async () => {
      run.disabled = true;
      stop.hidden = false;
      state.classList.remove("failed");
      state.textContent = "Queued.";
      try {
        let found = null;
        running = job(`/api/jobs/claim/${encodeURIComponent(row.key)}`, {}, (name, what) => {
          if (name === "progress") state.textContent = `Running: ${what.done} s.`;
          if (name === "paper") found = what;
        });
        await running.done;
        show(found);
        return;
      } catch (error) {
        state.textContent = error.message;
        state.classList.add("failed");
      }
      run.disabled = false;
      stop.hidden = true;
    } }, "Run its claim");
    const told = (name, words) => (words ? [make("dt", {}, name), make("dd", {}, words)] : []);
    const link = /^https?:/.test(row.link) ? make("a", { href: row.link, rel: "noreferrer", target: "_blank" }, row.link) : null;
    shown.replaceChildren(make("h2", {}, row.title), make("p", { class: "note" }, `${row.key} · ${row.room}`),
      make("dl", {}, ...told("What it is", row.about), ...told("Parity", row.parity), ...told("What its claim checks", row.expects),
        ...row.runs.flatMap((one) => told(`Ran at scale ${one.scale}`, make("span", {}, make("span", { class: "verdict" }, one.verdict),
          ` (${one.seconds.toFixed(0)} s): ${one.measured}`,
          ...one.premises.map((premise) => make("span", { class: "premise" }, `${premise.met ? "✓" : "✗"} ${premise.text}`))))),
        ...told("From Python", row.object ? make("code", {}, row.object.replace(":", ".")) : null), ...told("Link", link)),
      make("div", { class: "working" }, run, stop), state);
  }
  await look();
}
