// The text, a token a span: filled by what it is given, underlined by a second quantity.

import { paint } from "./colour.js";
import { make, percent, visible } from "./dom.js";

const SPOKEN = new Set(["system", "user", "assistant", "generated", "text"]);

// Whose turn each token is in. Special tokens belong to the turn that they open, if the next speaker is another one;
// of such a run, what stands before a line break still closes the turn before. What opens generated text was given, so
// it is of the turn before.
function speakers(items) {
  const out = items.map(({ role }) => (SPOKEN.has(role) ? role : null));
  for (let i = 0; i < out.length; i++) {
    if (out[i] !== null) continue;
    let end = i;
    while (end < out.length && out[end] === null) end++;
    const before = i ? out[i - 1] : null, after = end < out.length ? out[end] : null;
    const line = items.slice(i, end - 1).findIndex(({ token }) => token.includes("\n"));
    const given = after === "generated" && before !== "generated";
    const split = given ? end : before === null ? i : after === null ? end : line < 0 ? i : i + line + 1;
    for (let j = i; j < end; j++) out[j] = (j < split ? before : after) ?? (given ? "start" : "text");
    i = end;
  }
  return out;
}

// data: {items: [{position, token, role, image, row, column}], label, ids: tokens are ids}; events: choose(i), look(i | null), clear().
// Handle: show({fill, scale, bar, chosen}) with arrays by item, `each`: fill holds shares of different rows; mark(i | null); reveal(i).
export function text(element, data, events) {
  const { items } = data;
  const spans = new Array(items.length).fill(null);
  const chips = [];
  const box = make("div", { class: data.ids ? "text ids" : "text", role: "listbox", "aria-label": data.label, "aria-orientation": "horizontal" });
  let block = null, chip = null;
  const turns = speakers(items);
  items.forEach((item, i) => {
    if (!i || turns[i] !== turns[i - 1]) {
      block = make("div", { class: "turn-text" });
      box.append(make("div", { class: `turn ${turns[i]}`, role: "presentation" },
        make("span", { class: "turn-role" }, turns[i]), block));
    }
    // Patches are chosen in the picture, and padding says nothing: here they are one chip.
    const run = item.image >= 0 ? item.image : item.role === "pad" ? "pad" : null;
    if (run !== null) {
      if (chip?.run !== run) {
        chips.push(chip = { run, members: [], share: make("b", {}) });
        chip.words = make("span", {});
        block.append(chip.element = make("span", { class: "chip", role: "presentation" }, chip.words, chip.share));
      }
      chip.members.push(i);
      const n = chip.members.length;
      chip.words.textContent = run === "pad" ? `${n} of padding` : `▦ picture ${run + 1}, ${n} patches `;
      return;
    }
    chip = null;
    const quiet = item.role === "bos" || item.role === "special";
    const frame = item.role === "frame";
    const breaks = /\n/.test(item.token);
    // A line break stays one, after a sign that can be hovered and chosen; a token of blanks stays blanks.
    const shown = frame ? "" : quiet || !/^[ ]*[^\p{Cc}\p{Cf}]+$/u.test(item.token) ? visible(item.token) : item.token;
    const span = make("span", { role: "option", tabindex: "-1", "data-i": i,
      title: item.unread ? "Generated last: the model was never run on it" : null,
      class: ["token", item.unread && "unread", quiet && "quiet", frame && "frame", breaks && "break"].filter(Boolean).join(" ") }, shown);
    spans[i] = span;
    block.append(span);
    if (breaks && !quiet) block.append(...Array.from(item.token.match(/\n/g).slice(0, 2), () => make("br")));
  });
  // Last: it would be looked for anew with every token, in all of a text of ids, which have no direction.
  for (const one of box.querySelectorAll(".turn-text")) one.setAttribute("dir", "auto");
  element.append(box);

  const place = (target) => {
    const span = target.closest?.(".token");
    return span ? Number(span.dataset.i) : null;
  };
  let home = null, under = null;
  const rest = (span) => { if (home) home.tabIndex = -1; (home = span).tabIndex = 0; };
  const order = spans.flatMap((span, i) => (span ? [i] : []));
  if (order.length) rest(spans[order[0]]);
  box.addEventListener("click", (event) => {
    const i = place(event.target);
    if (i === null) return;
    rest(spans[i]);
    events.choose(i);
  });
  box.addEventListener("pointermove", (event) => {
    const i = event.pointerType === "touch" ? null : place(event.target);
    if (i !== under) events.look(under = i);
  });
  box.addEventListener("pointerleave", () => { if (under !== null) events.look(under = null); });
  box.addEventListener("focusin", (event) => {
    const i = place(event.target);
    if (i !== null) { rest(spans[i]); if (event.target.matches(":focus-visible")) events.look(under = i); }
  });
  box.addEventListener("focusout", () => { if (under !== null) events.look(under = null); });
  const vertical = (i, way) => { // the nearest token of the next line that way
    const from = spans[i].getBoundingClientRect(), middle = from.left + from.width / 2;
    let best = i, line = null, off = Infinity;
    for (let n = order.indexOf(i) + way; order[n] !== undefined; n += way) {
      const at = spans[order[n]].getBoundingClientRect();
      if (Math.abs(at.top - from.top) < 4) continue;
      if (line !== null && Math.abs(at.top - line) >= 4) break;
      line ??= at.top;
      const distance = Math.abs(at.left + at.width / 2 - middle);
      if (distance < off) [best, off] = [order[n], distance];
    }
    return best;
  };
  box.addEventListener("keydown", (event) => {
    const i = place(event.target);
    if (i === null) return;
    const n = order.indexOf(i);
    let to = null;
    if (event.key === "ArrowRight") to = order[n + 1];
    else if (event.key === "ArrowLeft") to = order[n - 1];
    else if (event.key === "ArrowDown") to = vertical(i, 1);
    else if (event.key === "ArrowUp") to = vertical(i, -1);
    else if (event.key === "Home") to = order[0];
    else if (event.key === "End") to = order[order.length - 1];
    else if (event.key === "Enter" || event.key === " ") events.choose(i);
    else if (event.key === "Escape") events.clear();
    else return;
    event.preventDefault();
    if (to !== null && to !== undefined) spans[to].focus();
  });

  return {
    show({ fill, scale, bar, chosen, each = false }) {
      // Relative to the largest, but small shares stay thin where all are small.
      const tallest = bar ? bar.reduce((most, x) => (x > most ? x : most), 0.05) : 0;
      order.forEach((i) => {
        const span = spans[i], value = fill ? fill[i] : NaN, at = Number.isFinite(value) ? scale.at(value) : 0;
        if (at > 0.02) {
          const { fill: colour, ink } = paint(at);
          span.style.background = colour;
          span.style.color = ink;
        } else span.style.background = span.style.color = "";
        span.classList.toggle("over", at > 1.001);
        const height = tallest && bar[i] > 0 ? 4.5 * Math.sqrt(bar[i] / tallest) : 0;
        span.style.boxShadow = height >= 0.6 ? `0 ${height.toFixed(1)}px 0 0 var(--second)` : "";
        span.classList.toggle("chosen", i === chosen);
        span.setAttribute("aria-selected", String(i === chosen));
      });
      for (const one of chips) {
        if (one.run === "pad") continue;
        let sum = 0, known = false;
        for (const i of one.members) if (fill && fill[i] === fill[i]) { sum += fill[i]; known = true; }
        const words = each ? `${percent(sum / one.members.length)} on average` : `${percent(sum)} in all`;
        one.share.textContent = known && data.shares() ? words : "";
        one.element.classList.toggle("chosen", one.members.includes(chosen));
      }
    },
    mark(i) {
      box.querySelector(".marked")?.classList.remove("marked");
      spans[i]?.classList.add("marked");
    },
    // Scrolls the text, not the page.
    reveal(i) {
      const frame = element.getBoundingClientRect(), at = spans[i]?.getBoundingClientRect();
      const hidden = at && (at.top < frame.top || at.bottom > frame.bottom);
      if (hidden) element.scrollTop += at.top - frame.top - frame.height / 2;
      if (spans[i] && document.activeElement?.closest(".text") !== box) rest(spans[i]);
    },
  };
}
