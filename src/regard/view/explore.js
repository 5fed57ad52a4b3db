// A recording to walk through: heads, text, pictures, and what the chosen head does with the chosen token.

import { headsCards, lineCard, listCard, mapCard, pictureCard, sinkCard, textCard } from "./cards.js";
import { choice, make, menu, named } from "./dom.js";
import { Places } from "./places.js";
import { meanOf } from "./recording.js";

// data: a Recording; events: changed(state) after every choice, drawn() once heads and text are up to date.
// State: {stack, sample, layer, head, token, scope}: indices, but for token, an address (see Places) or null, and scope:
// head, layer, all, rollout. Handle: go(state), redraw(), state.
export function explore(element, data, events) {
  const state = { stack: 0, sample: 0, layer: 0, head: 0, token: null, scope: "head" };
  const remembered = {}; // what each stack's menus were set to
  let shown = null; // the stack and sample on the screen: {refresh, resink, reveal}

  function set(changes) {
    const other = ["stack", "sample"].some((name) => name in changes && changes[name] !== state[name]);
    Object.assign(state, changes);
    if (other) build();
    else {
      shown.refresh();
      shown.reveal();
    }
    events.changed(state);
  }

  function build() {
    const now = looking(), { recorded, sample, places } = now;
    const heads = headsCards(now), texts = textCard(now), lines = lineCard(now), sinks = sinkCard(now);
    const pictures = now.pictures.length ? pictureCard(now) : null;
    const lists = recorded.weights ? listCard(now, texts.mark) : null, pairs = recorded.weights ? mapCard(now) : null;
    const fixed = () => places.find(state.token);
    const itemAt = (place) => (place ? places[place.side][place.i] : null);
    // What was loaded for the state: weights of the scope, the shade, and what the thumbnails need.
    let weights = null, shade = null, others = { heads: [] }, turn = 0;

    // Draws what follows the token under the pointer, or else the chosen one.
    function look() {
      const at = itemAt(now.hovered ?? fixed()), plain = !at || !weights; // plain: the text stays shaded
      const row = !plain && at.query >= 0 ? weights.row(at.query) : null;
      const column = !plain && at.key >= 0 ? weights.column(at.key) : null;
      const seen = { at, plain, row, column, weights, others, fixed: fixed(), name: at ? named(at) : "",
        whole: now.scopeWords(), byKey: places.byItem(plain ? shade : row, "key"),
        byQuery: places.byItem(column, "query") };
      texts.draw(seen);
      lists?.draw(seen);
      pictures?.draw(seen);
      pairs?.cross(at?.query >= 0 ? at.query : null);
    }
    now.redraw = look;

    async function load(current) {
      const { layer, head, scope } = state, variable = now.shade();
      const of = (which, h = head) => (variable ? sample.series(variable, which, layer, h) : null);
      const rolled = pictures || scope === "rollout" ? await sample.weights("rollout") : null;
      const rolledShade = rolled ? meanOf(sample.queries.map((_, q) => rolled.row(q))) : null;
      const loaded = [await sample.weights(scope, layer, head), scope === "rollout" ? rolledShade : await of(scope)];
      const around = { heads: [] };
      if (pictures) {
        const each = await sample.layer(layer), shades = await Promise.all(recorded.heads.map((_, h) => of("head", h)));
        around.heads = recorded.heads.map((_, h) => ({ weights: each[h], shade: shades[h] }));
        around.layer = { weights: await sample.weights("layer", layer), shade: await of("layer") };
        around.all = { weights: others.all?.weights, shade: await of("all") };
        around.rollout = { weights: rolled, shade: rolledShade };
      }
      if (current()) [[weights, shade], others] = [loaded, around];
    }

    async function refresh() {
      const ticket = ++turn, current = () => ticket === turn && shown?.refresh === refresh;
      element.setAttribute("aria-busy", "true");
      const headsDrawn = heads.draw();
      await load(current);
      if (!current()) return;
      look();
      element.setAttribute("aria-busy", "false");
      await headsDrawn;
      events.drawn?.();
      const at = itemAt(fixed());
      await lines.draw(at, current);
      // The map and the mean of all heads are the heavy part: after the rest is on the screen.
      await new Promise((done) => setTimeout(done, 30));
      if (!current()) return;
      if (weights) pairs?.draw(weights, at?.query >= 0 ? at.query : null);
      if (pictures && recorded.weights && !others.all.weights) {
        others.all.weights = await sample.weights("all");
        if (current()) look();
      }
    }

    now.reshade = refresh;
    shown = { refresh, resink: sinks.draw, reveal: () => { if (fixed()) texts.reveal(fixed()); } };

    const held = element.querySelector("nav")?.contains(document.activeElement) ? document.activeElement : null;
    const bar = stackBar(now), aside = make("div", { class: "aside" }, ...heads.elements);
    const pair = [pairs?.element, lines.empty ? null : lines.element];
    const notices = recorded.notices.map((words) => make("p", { class: "notice", role: "note" }, words));
    const main = make("div", { class: "main" },
      pictures?.element, texts.element, lists?.element, make("div", { class: "pair" }, ...pair));
    element.replaceChildren(bar, ...notices, make("div", { class: "workbench" }, aside, main), sinks.element);
    if (held) bar.querySelector(held.matches("select") ? "select" : '[aria-pressed="true"]')?.focus();
    refresh();
    sinks.draw();
    shown.reveal();
    stick(aside);
  }

  // The stack and sample that the state points to, with what the cards need to know of it.
  function looking() {
    const recorded = data.stacks[state.stack], sample = data.samples[state.stack][state.sample];
    const cross = recorded.kind === "cross", places = new Places(sample, cross);
    const given = recorded.variables.filter(({ along }) => along === "key");
    const menus = (remembered[state.stack] ??= { shade: given[0]?.name, side: "query" });
    // Cross attention of patches to words has its picture on the side of the queries.
    const onSide = places.key.some(({ image }) => image >= 0) ? "key" : "query";
    const pictures = recorded.grids.map((grid, image) => {
      const fits = (place) => place.image === image && place.row >= 0 && place.row < grid[0]
        && place.column >= 0 && place.column < grid[1];
      const cells = places[onSide].flatMap((place, i) => (fits(place) ? [{ i, row: place.row, column: place.column }] : []));
      return { grid, image, cells, source: data.pictures[image] };
    });
    const headName = (l, h) => `Layer ${recorded.layers[l]}, head ${recorded.heads[h]}`;
    const now = { recorded, sample, places, cross, state, menus, given, headName, onSide, set, hovered: null, rule: data.sink,
      pictures: pictures.filter(({ cells }) => cells.length),
      shade: () => given.find(({ name }) => name === menus.shade),
      choose: (side) => (i) => {
        const token = places.address(side, i);
        set({ token: token === state.token ? null : token });
      },
      look: (side) => (i) => {
        now.hovered = i === null ? null : { side, i };
        now.redraw();
      },
      clear: () => set({ token: null }),
      scopeWords: () => ({ head: headName(state.layer, state.head).toLowerCase(), all: "mean of all heads",
        layer: `mean of layer ${recorded.layers[state.layer]}`, rollout: "all layers rolled together" })[state.scope] };
    return now;
  }

  function stackBar({ recorded, sample, cross }) {
    const bar = make("nav", { class: "stacks", "aria-label": "Stack" });
    if (data.stacks.length > 1) {
      const options = data.stacks.map(({ name }, value) => ({ value, label: name.replaceAll("_", " ") }));
      bar.append(choice("Stack", options, state.stack, (stack) => {
        const [layer, head] = data.starts[stack];
        set({ stack, sample: 0, layer, head, token: null, scope: "head" });
      }).element);
    }
    const kind = cross ? "Cross attention" : recorded.causal ? "Causal self attention" : "Self attention";
    const real = (side) => side.filter(({ role }) => role !== "pad").length;
    const size = cross ? `${real(sample.queries)} queries, ${real(sample.keys)} keys` : `${real(sample.keys)} tokens`;
    bar.append(make("span", { class: "facts" },
      `${kind}, ${recorded.layers.length} layers × ${recorded.heads.length} heads, ${size}`));
    if (recorded.samples > 1) {
      const options = data.samples[state.stack].map((_, value) =>
        ({ value, label: `${value + 1} of ${recorded.samples}` }));
      bar.append(menu("Sample", options, state.sample, (value) => set({ sample: value, token: null })));
    }
    return bar;
  }

  // The heads stay in sight while the rest scrolls: by the top, or by the bottom where they are taller than the window.
  let stuck = null;
  const place = () => { if (stuck) stuck.style.top = `${Math.min(12, innerHeight - stuck.offsetHeight - 12)}px`; };
  const sizes = new ResizeObserver(place);
  addEventListener("resize", place);
  function stick(aside) {
    if (stuck) sizes.unobserve(stuck);
    sizes.observe(stuck = aside);
  }

  return {
    state,
    go(changes) { Object.assign(state, changes); build(); },
    redraw() { shown?.refresh(); shown?.resink(); },
  };
}
