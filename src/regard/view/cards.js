// The parts of the page: each puts views on a card and says in words what they show.
//
// `now` is what is looked at: {recorded (the stack's header), sample, places, cross, state, menus, given (variables by
// key), shade() (the one chosen), pictures, onSide (whose patches they show: "key" or "query"), set(changes), choose(side) -> (i), look(side) -> (i), clear(), redraw(),
// reshade(), headName(l, h), scopeWords()}. `seen` is what the token under the pointer, or else the chosen one, gives:
// see `look` in explore.js.

import { atlas } from "./atlas.js";
import { legend, shadeScale, straightScale } from "./colour.js";
import { line, list, map, numbers, sinks } from "./detail.js";
import { choice, lowered, make, measure, menu, named, percent, visible } from "./dom.js";
import { picture, strip } from "./picture.js";
import { card } from "./save.js";
import { text } from "./text.js";

const UNREAD = "It was generated last, and the model was never run on it: the row of the token before chose it.";
const MUTE = new Set(["bos", "special", "register", "pad"]);

const note = (words) => make("p", { class: "note" }, words);

// The atlas, and the chosen head's numbers.
export function headsCards(now) {
  const { recorded, sample, state, menus } = now, { layers, heads } = recorded;
  const options = recorded.variables.flatMap((variable) => (variable.roles ?? [null]).map((role, r) => ({
    variable, role: r, value: `${variable.name}/${r}`, group: role === null ? null : variable.label,
    label: role === null ? variable.label : `${variable.label}: ${role}` })));
  menus.statistic ??= options[0]?.value;
  const chosen = () => options.find(({ value }) => value === menus.statistic);

  const box = make("div", {}), key = make("div", {}), about = note("");
  const readout = make("p", { class: "readout", "aria-live": "polite" });
  const left = card("heads", "Heads", box, readout, key, about), table = make("tbody", {});
  const kinds = note(""), right = card("numbers", "", recorded.kinds ? kinds : null, make("table", { class: "among" }, table));
  if (!options.length) about.textContent = "The recording holds no statistic to colour the heads by.";
  else left.head.append(menu("Colour by", options, menus.statistic, (value) => { menus.statistic = value; draw(); }));

  let values = layers.map(() => heads.map(() => NaN));
  const words = (l, h) => {
    const value = values[l][h], kind = recorded.kinds?.[l][h] ? `, ${recorded.kinds[l][h]}` : "";
    if (!chosen()) return now.headName(l, h) + kind;
    return `${now.headName(l, h)}${kind}: ${Number.isFinite(value) ? measure(value, chosen().variable) : "not recorded"}`;
  };
  const say = (l, h) => { readout.textContent = l === null ? words(state.layer, state.head) : words(l, h); };
  const grid = atlas(box, { layers, heads, sites: recorded.sites },
    { choose: (layer, head) => now.set({ layer, head, scope: "head" }), look: say });
  const among = numbers(table);

  async function draw() {
    const { layer, head } = state;
    const rows = await Promise.all(options.map(async (option) =>
      ({ ...option, values: await sample.heads(option.variable, option.role), layer, head })));
    if (layer !== state.layer || head !== state.head) return;
    const option = chosen();
    if (option) values = rows[options.indexOf(option)].values;
    const scale = straightScale(values.flatMap((row) => Array.from(row)));
    grid.show({ values, scale, words, layer, head });
    say(null);
    right.heading.textContent = now.headName(layer, head);
    kinds.textContent = recorded.kinds?.[layer][head] || "Of no kind that the atlas knows.";
    among.show(rows);
    if (!option) return;
    about.textContent = option.variable.about;
    const format = (value) => measure(value, option.variable);
    key.replaceChildren(legend(scale, format, scale.flat ? "About the same in every head."
      : scale.clipped ? `It ends early: the highest reaches ${format(scale.most)}.` : ""));
  }
  return { elements: [left.element, right.element], draw };
}

// The text, or the two of cross attention. Handle: draw(seen), mark(side) -> (i), reveal(fixed).
export function textCard(now) {
  const { recorded, places, cross, state, menus, given } = now;
  const only = places.key.every(({ image, role }) => image >= 0 || MUTE.has(role));
  const one = card("reading", cross ? "Texts" : only ? "Tokens" : "Text");
  const { rollout } = recorded;
  const scope = choice("Weights of", [
    { value: "head", label: "This head" },
    { value: "layer", label: "Mean of layer" },
    { value: "all", label: "All heads" },
    { value: "rollout", label: "Rolled together", disabled: !rollout.blocks,
      title: rollout.blocks ? "All layers multiplied up, half of each left to the residual stream (Abnar & Zuidema 2020)"
        : `Not here: ${rollout.reason}` },
  ], state.scope, (value) => now.set({ scope: value }));
  one.head.append(scope.element);

  const status = make("p", { class: "status", "aria-live": "polite" });
  const key = make("div", {}), second = make("p", { class: "second-key" });
  one.element.append(status, make("div", { class: "key" }, key, cross ? null : second));
  let shares = false;
  const texts = {};
  const add = (side, label) => {
    const box = make("div", { class: "text-box" });
    one.element.append(...(cross ? [make("h3", {}, label)] : []), box);
    texts[side] = text(box, { items: places[side], label, ids: recorded[side].ids, shares: () => shares },
      { choose: now.choose(side), look: now.look(side), clear: now.clear });
  };
  if (cross) add("query", "Who looks: queries");
  add("key", cross ? "What is looked at: keys" : "Tokens; arrow keys move, Enter chooses, Escape clears");
  if (given.length > 1) {
    const options = given.map(({ name, label }) => ({ value: name, label }));
    one.element.append(menu("Without a chosen token, shade by", options, menus.shade, (value) => {
      menus.shade = value;
      now.reshade();
    }));
  }

  function say({ at, plain, name, row, column, whole }) {
    if (plain && !at) {
      const shaded = now.shade() ? `Shaded by ${lowered(now.shade().label)}, ${whole}. ` : "";
      status.replaceChildren(shaded, make("span", { class: "hint" }, recorded.weights
        ? "Point at a token to see where it looks; choose it to keep it."
        : "The file holds no weights of this stack: record rows or top keys to see where each token looks."));
      return;
    }
    const rest = row ? "Filled: where it looks." : at.unread ? UNREAD : plain ? "The file holds no weights of this stack."
      : cross && column ? "Filled: who looks at it." : "No row of it was recorded.";
    status.replaceChildren(make("b", {}, make("bdi", {}, name)), ` at ${at.position} (${at.role}), ${whole}. ${rest}`);
  }

  function draw(seen) {
    const { at, plain, fixed, byKey, byQuery, column, name } = seen;
    shares = !plain;
    scope.show(state.scope);
    say(seen);
    for (const [side, view] of Object.entries(texts)) {
      const fill = side === "key" ? byKey : plain ? null : byQuery;
      const scale = shadeScale(fill ?? [], places[side].map(({ role }) => !MUTE.has(role)));
      const mine = fixed && (!cross || fixed.side === side);
      const bar = cross || plain ? null : byQuery;
      view.show({ fill, scale, bar, chosen: mine ? fixed.i : null, each: side === "query" });
      // In cross attention a chosen key fills the queries: the key is that of the text which is filled.
      if (cross && !plain && !fill) continue;
      if (!fill && side === "query") continue;
      const format = shares ? percent : (value) => (now.shade() ? measure(value, now.shade()) : "");
      const cut = ` Cut, so that the largest (${format(scale.most)}) does not wash out the rest; outlined is beyond it.`;
      key.style.visibility = fill ? "" : "hidden"; // its room stays: the text below must not move from under the pointer
      if (fill) key.replaceChildren(legend(scale, format, `Square-root scale.${scale.clipped ? cut : ""}`));
    }
    const most = at && column ? column.reduce((a, b) => Math.max(a, b), 0) : 0;
    second.replaceChildren(make("i", { "aria-hidden": "true" }),
      `Underlined: looks at ${name}, with up to ${percent(most)} of its own attention.`);
    second.classList.toggle("empty", !(most > 0));
  }
  const of = (side) => texts[side in texts ? side : "key"];
  const mark = (side) => (i) => of(side).mark(i), reveal = ({ side, i }) => of(side).reveal(i);
  return { element: one.element, draw, mark, reveal };
}

// Pictures under their patches, with a thumbnail for each head of the layer and for the means.
export function pictureCard(now) {
  const { recorded, places, cross, state, menus, onSide } = now, { heads, rollout } = recorded;
  const one = card("pictures", now.pictures.length > 1 ? "Pictures" : "Picture");
  if (!cross) {
    const sides = [{ value: "query", label: "Where it looks" }, { value: "key", label: "Who looks at it" }];
    const side = choice("Direction", sides, menus.side, (value) => {
      menus.side = value;
      side.show(value);
      now.redraw();
    });
    one.head.append(side.element);
  }
  let shares = false;
  const format = (value) => (shares ? percent(value) : Number.isFinite(value) ? measure(value, now.shade()) : "–");
  const views = now.pictures.map(({ grid, image, cells, source }) => {
    const box = make("div", {});
    one.element.append(box);
    if (!source) one.element.append(note("The picture itself was not given to the report: only its grid is drawn."));
    else if (Math.abs(Math.log((source.width * grid[0]) / (source.height * grid[1]))) > 0.02) {
      one.element.append(note("The picture has other proportions than its grid: the model saw it resized or cropped. "
        + "The grid is drawn over the whole of it."));
    }
    return picture(box, { source: null, ...source, grid, image, cells, format, name: `Picture ${image + 1}` },
      { choose: now.choose(onSide), clear: now.clear,
        pick: (value) => now.set(typeof value === "number" ? { head: value, scope: "head" } : { scope: value }) });
  });
  const words = onSide === "key" && recorded.weights ? places.generated() : [];
  menus.words ??= "before";
  const explained = note("");
  const rows = words.length ? choice("Rows of the generated words", [
    { value: "before", label: "While it is chosen" }, { value: "own", label: "Once it is read" },
  ], menus.words, (value) => {
    menus.words = value;
    rows.show(value);
    now.redraw();
  }) : null;
  const strips = !words.length ? [] : now.pictures.map((shown) => strip(
    { ...shown.source, ...shown, source: shown.source?.source }, "Generated words", now.choose("query")));
  if (words.length) {
    one.element.append(make("div", { class: "card-head words" }, make("h3", {}, "Every generated word"), rows.element),
      explained, ...strips.map(({ element }) => element));
  }
  let drawn = {};
  function drawWords(weights, at) {
    const rowOf = ({ own, before }) => (menus.words === "before" ? before : own);
    if (drawn.weights !== weights || drawn.words !== menus.words) { // pointing at a token does not change them
      drawn = { weights, words: menus.words };
      explained.textContent = menus.words === "before"
        ? "Each map is the row of the token before the word: where the model looked when it chose the word."
        : "Each map is the word’s own row: where the model looked, having written the word, to choose the next one.";
      now.pictures.forEach(({ cells }, p) => strips[p].show(words.map((word) => {
        const query = places.query[rowOf(word)]?.query ?? -1, row = query >= 0 ? weights?.row(query) : null;
        const values = row ? places.byItem(row, "key") : null, inside = cells.map(({ i }) => values?.[i] || 0);
        return { value: rowOf(word), label: visible(places.query[word.own].token), values, high: shadeScale(inside).high,
          share: values ? percent(inside.reduce((sum, x) => sum + x, 0)) : "no row" };
      })));
    }
    for (const one of strips) one.mark(places.query.indexOf(at));
  }
  if (!rollout.blocks) one.element.append(note(`Rolled together, over all layers, is not here: ${rollout.reason}.`));

  // `seen.others`: what the thumbnails need, {heads, layer, all, rollout}, each {weights, shade}.
  function draw({ at, plain, name, whole, weights, byKey, others }) {
    shares = !plain;
    if (words.length) drawWords(weights, at);
    const looks = onSide === "key" && (cross || menus.side === "query");
    const shaded = (shade) => (onSide === "key" ? places.byItem(shade, "key") : null);
    const follow = (source) => {
      if (!source) return null;
      if (looks) return at.query >= 0 ? places.byItem(source.row(at.query), "key") : null;
      return at.key >= 0 ? places.byItem(source.column(at.key), "query") : null;
    };
    now.pictures.forEach(({ image, cells }, p) => {
      const inside = (values) => cells.reduce((sum, { i }) => sum + (values[i] || 0), 0);
      const high = (values) => shadeScale(values ? cells.map(({ i }) => values[i]) : []).high;
      const thumb = (label, value, source, title) => {
        const values = plain ? shaded(source?.shade) : follow(source?.weights);
        return { label, value, title, values, high: high(values),
          share: shares && looks && values ? percent(inside(values)) : "" };
      };
      const thumbs = [thumb("layer mean", "layer", others.layer), thumb("all heads", "all", others.all),
        thumb("rollout", "rollout", others.rollout, rollout.blocks ? "All layers rolled together" : rollout.reason),
        ...heads.map((head, h) => thumb(`head ${head}`, h, others.heads[h]))];
      const values = plain ? (onSide === "key" ? byKey : null) : follow(weights);
      const caption = plain && onSide === "query" ? "Choose a word among the keys to see which patches look at it."
        : plain ? `${now.shade()?.label ?? "No weights"}, ${whole}. Choose a token or a patch.`
        : !values ? `${name} has no ${looks ? "row" : "column"} here.`
          : looks ? `${name} gives ${percent(inside(values))} of its attention to this picture, ${whole}.`
            : `Patches by how much they look at ${name}, ${whole}.`;
      const chosen = state.scope === "head" ? state.head : state.scope;
      views[p].show({ values, high: high(values), thumbs, caption, chosen,
        mark: at?.image === image ? places.itemOf[onSide][at[onSide]] : null });
    });
  }
  return { element: one.element, draw };
}

// Where the token looks, and who looks at it, in order.
export function listCard(now, mark) {
  const { recorded, places, state } = now, boxes = [make("div", {}), make("div", {})];
  const one = card("lists", "Where it looks, and who looks at it", make("div", { class: "two" }, ...boxes));
  const looks = list(boxes[0], { items: places.key }, { choose: now.choose("key"), mark: mark("key") });
  const looked = list(boxes[1], { items: places.query }, { choose: now.choose("query"), mark: mark("query") });

  function draw({ at, name, row, column, byKey, byQuery }) {
    if (!at) {
      const shade = now.shade();
      looks.show({ title: shade ? `Most: ${lowered(shade.label)}` : "Where it looks", values: byKey, note: "",
        format: (value) => measure(value, shade), empty: "Choose a token in the text." });
      looked.show({ title: "Where does a token look?", values: null,
        empty: "Point at one in the text: this becomes two lists, where it looks and who looks at it. "
          + "In the text, arrow keys move, Enter chooses, Escape clears." });
      return;
    }
    const { form, k } = recorded.weights, kept = form === "top" && state.scope !== "rollout";
    const many = k === 1 ? "largest key" : `${k} largest keys`;
    const mass = percent(row ? row.reduce((sum, x) => sum + x, 0) : 0);
    looks.show({ title: `Where ${name} looks`, values: row && byKey,
      note: !kept ? `The largest of ${row ? row.filter((x) => x > 0).length : 0} keys with any weight.`
        : state.scope === "head" ? `The ${many}: ${mass} of the row.`
          : `The ${many} of each head’s row: ${mass} of the mean row.`,
      empty: at.unread ? UNREAD : at.query < 0 ? "It is a key only." : "No row of it was recorded." });
    looked.show({ title: `Who looks at ${name}`, values: column && byQuery,
      note: kept ? `Only rows that have it among their ${many}. Shares of each row.`
        : "Each share is of that row, so they do not add up to 100%.",
      empty: at.unread ? "No token came after it." : at.key < 0 ? "It is a query only." : kept ? `No row has it among its ${many}.` : "No token does." });
  }
  return { element: one.element, draw };
}

// Every pair. Handle: draw(weights, q), cross(q).
export function mapCard(now) {
  const { recorded, sample, places } = now, box = make("div", {}), key = make("div", { class: "key" });
  const one = card("all-pairs", "Every query and key", box, key);
  const { form, k } = recorded.weights, top = form === "top";
  const view = map(box, { queries: sample.queries, keys: sample.keys, absent: top ? `not among the ${k} largest` : "0%",
    hint: "Point at the map to read it. Drag a box to zoom in, click to choose a query."
      + (top ? ` Only the ${k} largest keys of each row are drawn.` : "") },
  { choose: (q) => now.choose("query")(places.itemOf.query[q]),
    shown: (scale, pairs) => key.replaceChildren(legend(scale, percent, "Square-root scale, of what is in view."
      + (pairs > 1 ? ` Each block is ${pairs.toLocaleString("en")} pairs: what its keys get together, mean of its queries.`
        : ""))) });
  const zoom = (label, words, factor) => make("button", { type: "button", "aria-label": words, title: words,
    onclick: () => view.zoom(factor) }, label);
  one.head.append(make("div", { class: "choice", role: "group", "aria-label": "Zoom" }, zoom("+", "Zoom in", 2),
    zoom("−", "Zoom out", 0.5), zoom("All", "All of it", 0)));
  return { element: one.element, cross: (q) => view.cross(q, null), draw(weights, q) {
    one.heading.textContent = `Every query and key, ${now.scopeWords()}`;
    view.show(weights, q);
  } };
}

// The variables along the tokens. Handle: draw(at), empty.
export function lineCard(now) {
  const { recorded, sample, places, state } = now, box = make("div", { class: "line-box" });
  const one = card("lines", "Along the tokens", box);
  const lines = recorded.variables.filter(({ along }) => along).map((variable) => {
    const { along } = variable;
    return { variable, view: line(box, { variable, places: along === "query" ? sample.queries : sample.keys },
      { choose: (i) => now.choose(along)(places.itemOf[along][i]) }) };
  });
  async function draw(at, current) {
    const { layer, head } = state, scope = state.scope === "rollout" ? "all" : state.scope;
    for (const { variable, view } of lines) {
      const roles = variable.roles ?? [null];
      const series = await Promise.all(roles.map((_, r) => sample.series(variable, scope, layer, head, r)));
      if (!current()) return;
      view.show({ series, chosen: at?.[variable.along] >= 0 ? at[variable.along] : null });
    }
    one.heading.textContent = `Along the tokens, ${scope === "all" ? "mean of all heads" : now.scopeWords()}`;
  }
  return { element: one.element, draw, empty: !lines.length };
}

// The keys that the report found to be sinks, by layer. Handle: draw().
export function sinkCard(now) {
  const { recorded, sample, places, rule } = now, { layers } = recorded;
  const box = make("div", {});
  const words = make("p", { class: "lead" }, "A few tokens, often the very first, soak up attention whatever the input says: "
    + `heads look there when they have nothing to look for. Listed is what gets at least ${percent(rule.share)} of all attention `
    + `of some layer (mean over its heads), and at least ${rule.times} times what even attention would give a key of its place`
    + `${recorded.causal ? ", early keys being seen by more queries" : ""}. In the cells, the share in each layer. `
    + "Not all of it need be a sink: it may also be what the input is about.");
  const one = card("sink", "Sinks", make("div", { class: "sink-body" }, words, box));
  const view = sinks(box, { layers, places: sample.keys }, { choose: (k) => now.choose("key")(places.itemOf.key[k]) });
  one.element.hidden = !recorded.sinks;
  return { element: one.element, draw: () => recorded.sinks && view.show(recorded.sinks[sample.sample]) };
}
