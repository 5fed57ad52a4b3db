// The report: its data blocks, its address, its theme.

import { explore } from "./explore.js";
import { inflate, Recording } from "./recording.js";
import { themed } from "./theme.js";

const header = JSON.parse(document.getElementById("header").textContent);
const recording = new Recording(header, (block) => inflate(document.getElementById(`block-${block}`).textContent));

themed(document.getElementById("theme"), () => page.redraw());

// #stack/layer/head/token/scope/sample, in the recording's own labels; parts at the end may be missing.
function parse(hash) {
  const parts = hash.replace(/^#/, "").split("/").map((part) => {
    try { return decodeURIComponent(part); } catch { return part; }
  });
  const stack = recording.stacks.findIndex(({ name }) => name === parts[0]);
  if (stack < 0) return null;
  const { layers, heads, samples, rollout } = recording.stacks[stack];
  const start = header.starts[stack];
  const index = (labels, label, otherwise) => {
    const at = label ? labels.indexOf(Number(label)) : -1;
    return at >= 0 ? at : otherwise;
  };
  const scopes = ["head", "layer", "all", ...(rollout.blocks ? ["rollout"] : [])];
  return { stack, layer: index(layers, parts[1], start[0]), head: index(heads, parts[2], start[1]),
    token: /^k?-?\d+$/.test(parts[3] ?? "") ? parts[3] : null, scope: scopes.includes(parts[4]) ? parts[4] : "head",
    sample: parts[5] < samples ? Number(parts[5]) : 0 };
}

function address({ stack, layer, head, token, scope, sample }) {
  const { name, layers, heads } = recording.stacks[stack];
  const parts = [encodeURIComponent(name), layers[layer], heads[head], token ?? "-", scope, sample];
  if (!sample) parts.pop();
  if (!sample && scope === "head") parts.pop();
  return `#${parts.join("/")}`;
}

// In a notebook the page stands in a frame that has no address: nothing is kept there, and links lead to no other page.
// What is chosen is told to whoever holds the frame, and chosen as they say: addresses, and nothing else.
const framed = location.protocol === "about:";
const told = (state, begins = false) => parent.postMessage({ regard: address(state), begins }, "*"); // nothing secret
if (framed) {
  addEventListener("message", ({ source, data }) => {
    const next = source === parent && typeof data?.regard === "string" ? parse(data.regard) : null;
    if (next) page.go(next);
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#"]');
    if (!link) return;
    event.preventDefault();
    const next = parse(link.getAttribute("href"));
    if (next) {
      page.go(next);
      told(next);
    } else document.querySelector(link.getAttribute("href"))?.focus();
  });
}

// replaceState, not location.hash: choosing twenty tokens should not take twenty steps back.
const page = explore(document.getElementById("explore"), recording,
  { changed: (state) => { if (framed) told(state); else history.replaceState(null, "", address(state)); },
    // Milliseconds from opening the page to the first picture of heads and text.
    drawn: () => { document.documentElement.dataset.drawn ??= Math.round(performance.now()); } });
const first = parse(`#${encodeURIComponent(recording.stacks[header.start].name)}`);
page.go(parse(location.hash) ?? first);
if (framed) told(page.state, true);
addEventListener("hashchange", () => {
  const next = parse(location.hash);
  if (!next) return;
  page.go(next);
  const main = document.getElementById("explore");
  if (main.getBoundingClientRect().top > innerHeight / 2) main.scrollIntoView();
});
