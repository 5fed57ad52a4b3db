// What one head does: ordered lists of tokens, the map of all queries and keys, lines along the tokens, numbers among
// all heads, and what stands out among the keys.

import { paint, ramp, roleHue, SAME, shadeScale } from "./colour.js";
import { make, measure, named, ordinal, percent, visible } from "./dom.js";

const LONGEST = 10; // entries of a list
const FINEST = 420; // pixels of the map

const largest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
const smallest = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);

// Where on an element of n columns (or rows) the pointer is.
function under(event, box, n, across = true) {
  const part = across ? (event.clientX - box.left) / box.width : (event.clientY - box.top) / box.height;
  return Math.min(n - 1, Math.max(0, Math.floor(part * n)));
}

// The largest values in order. data: {items}; events: choose(i), mark(i | null).
// Handle: show({title, values, format, note, empty}); values by item.
export function list(element, data, events) {
  const { items } = data;
  const title = make("h3", {}), note = make("p", { class: "note" });
  const entries = make("ol", { class: items.some(({ image }) => image >= 0) ? "list patches" : "list" });
  entries.style.setProperty("--rows", Math.min(LONGEST, items.length));
  element.append(title, entries, note);

  // A token between its neighbours, each in its own direction: a right-to-left one must not reorder the others.
  function context(i) {
    const item = items[i], beside = (token) => make("bdi", {}, token ? visible(token) : "");
    if (item.role === "frame" && item.token) return [make("b", {}, item.token)]; // a time needs no neighbours
    if (item.image >= 0 || item.token === "") return [make("b", {}, named(item, true))];
    return [beside(items[i - 1]?.token), make("b", {}, make("bdi", {}, visible(item.token))), beside(items[i + 1]?.token)];
  }

  function entry(i, share, words) {
    const filled = make("i", {}), bar = make("span", { class: "bar", "aria-hidden": "true" }, filled);
    filled.style.width = `${100 * share}%`;
    const mark = () => events.mark(i), unmark = () => events.mark(null);
    return make("li", {}, make("button", { type: "button", "data-position": items[i].position,
      onclick: () => events.choose(i), onpointerenter: mark, onpointerleave: unmark, onfocus: mark, onblur: unmark },
    make("span", { class: "place" }, String(items[i].position)), make("span", { class: "context" }, ...context(i)), bar,
    make("span", { class: "share" }, words)));
  }

  return {
    show({ title: words, values, format = percent, note: remark, empty }) {
      title.textContent = words;
      const best = values ? Array.from(values.keys()).filter((i) => values[i] > 0)
        .sort((a, b) => values[b] - values[a]).slice(0, LONGEST) : [];
      note.textContent = best.length ? remark : empty;
      const held = entries.contains(document.activeElement);
      entries.replaceChildren(...best.map((i) => entry(i, values[i] / values[best[0]], format(values[i]))));
      if (held) entries.querySelector("button")?.focus();
    },
  };
}

// Queries down, keys across: a pixel a pair, or a block of them where there are more than FINEST, which opens as one
// zooms in. data: {queries, keys, hint, absent: words for a weight of 0}; events: choose(q), shown(scale, perBlock).
// Handle: show(weights, q | null); cross(q | null, k | null); zoom(factor | 0 for all of it).
export function map(element, data, events) {
  const { queries, keys } = data;
  // Padding at either end is not drawn.
  const spread = (side) => {
    const there = side.flatMap(({ role }, i) => (role === "pad" ? [] : [i]));
    return there.length ? [there[0], there[there.length - 1] + 1] : [0, side.length];
  };
  const whole = [spread(queries), spread(keys)];
  let view = whole;
  const canvas = make("canvas", { width: 1, height: 1, role: "img", "aria-label": `Map of ${queries.length} queries, down, `
    + `and ${keys.length} keys, across; choose a token in the text for its numbers` });
  const across = make("div", { class: "cross-line row" }), down = make("div", { class: "cross-line column" });
  const drawn = make("div", { class: "zoom-box", hidden: true });
  const frame = make("div", { class: "map-frame", tabindex: "0", role: "application",
    "aria-label": "Map: plus and minus zoom, arrow keys move, 0 shows all of it" }, canvas, across, down, drawn);
  const length = ([from, to]) => to - from;
  frame.style.aspectRatio = `${Math.min(3, Math.max(1 / 3, length(whole[1]) / length(whole[0])))}`;
  const readout = make("p", { class: "readout", "aria-live": "polite" }, data.hint);
  const axes = [make("span", { class: "axis" }), make("span", { class: "axis down" })];
  element.append(make("div", { class: "map" }, axes[0], frame, axes[1]), readout);

  let weights = null, chosen = null, last = { q: null, row: null }, blocks = null, from = null;
  const clip = ([a, b], [low, high]) => {
    const n = Math.min(high - low, Math.max(4, Math.round(b - a))), start = Math.min(high - n, Math.max(low, Math.round(a)));
    return [start, start + n];
  };
  function look(next) {
    view = next.map((range, side) => clip(range, whole[side]));
    draw();
  }
  const middle = ([a, b]) => (a + b) / 2;
  function zoom(factor, at = null) {
    if (!factor) return look(whole);
    const centre = at ?? [chosen !== null && chosen >= view[0][0] && chosen < view[0][1] ? chosen : middle(view[0]), middle(view[1])];
    return look(view.map((range, side) => {
      const n = length(range) / factor;
      return [centre[side] - n / 2, centre[side] + n / 2];
    }));
  }
  const under2 = (event) => {
    const box = canvas.getBoundingClientRect();
    return [view[0][0] + under(event, box, length(view[0]), false), view[1][0] + under(event, box, length(view[1]))];
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch") return;
    from = { at: under2(event), x: event.clientX, y: event.clientY };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [q, k] = under2(event);
    if (from && Math.hypot(event.clientX - from.x, event.clientY - from.y) > 5) {
      drawn.hidden = false;
      const ends = [[from.at[0], q], [from.at[1], k]].map((pair) => pair.sort((a, b) => a - b));
      const put = (name, size, side) => {
        drawn.style[name] = `${(100 * (ends[side][0] - view[side][0])) / length(view[side])}%`;
        drawn.style[size] = `${(100 * (ends[side][1] + 1 - ends[side][0])) / length(view[side])}%`;
      };
      put("top", "height", 0);
      put("left", "width", 1);
    }
    say(q, k);
    cross(q, k);
  });
  canvas.addEventListener("pointerup", (event) => {
    const began = from, [q, k] = under2(event);
    from = null;
    if (!began) return;
    if (drawn.hidden) { events.choose(q); return; }
    drawn.hidden = true;
    look([[began.at[0], q], [began.at[1], k]].map((pair) => {
      const [a, b] = pair.sort((x, y) => x - y);
      return [a, b + 1];
    }));
  });
  canvas.addEventListener("click", (event) => { if (event.pointerType === "touch") events.choose(under2(event)[0]); });
  canvas.addEventListener("dblclick", (event) => zoom(4, under2(event)));
  canvas.addEventListener("pointerleave", () => {
    readout.textContent = data.hint;
    cross(null, null);
  });
  frame.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) look(view.map(([a, b], side) => [a + step[side] * (b - a) / 4, b + step[side] * (b - a) / 4]));
    else if (event.key === "+" || event.key === "=") zoom(2);
    else if (event.key === "-") zoom(0.5);
    else if (event.key === "0") zoom(0);
    else return;
    event.preventDefault();
  });

  function say(q, k) {
    if (!blocks) return;
    const { perRow, perColumn, width, share } = blocks;
    if (perRow > 1 || perColumn > 1) {
      const r = Math.floor((q - view[0][0]) / perRow), c = Math.floor((k - view[1][0]) / perColumn);
      const ends = (i, per, [start, end], places) => {
        const a = start + i * per, b = Math.min(end, a + per) - 1;
        return a === b ? String(places[a].position) : `${places[a].position}–${places[b].position}`;
      };
      readout.textContent = `Queries ${ends(r, perRow, view[0], queries)} give keys ${ends(c, perColumn, view[1], keys)} `
        + `${percent(share[r * width + c])} of their attention, on average.`;
      return;
    }
    if (last.q !== q) last = { q, row: weights?.row(q) };
    const told = !last.row ? "no row" : last.row[k] ? percent(last.row[k]) : data.absent;
    readout.textContent = `${named(queries[q])} (${queries[q].position}) looks at `
      + `${named(keys[k])} (${keys[k].position}): ${told}`;
  }

  function cross(q, k) {
    const row = q ?? chosen;
    const put = (bar, side, at, name, size) => {
      bar.hidden = at === null || at < view[side][0] || at >= view[side][1];
      if (bar.hidden) return;
      bar.style[name] = `${(100 * (at - view[side][0])) / length(view[side])}%`;
      bar.style[size] = `${100 / length(view[side])}%`;
    };
    put(across, 0, row, "top", "height");
    put(down, 1, k, "left", "width");
  }

  function draw() {
    if (!weights) return;
    const [perRow, perColumn] = view.map((range) => Math.ceil(length(range) / FINEST));
    const share = weights.pool(...view, perRow, perColumn);
    const width = Math.ceil(length(view[1]) / perColumn), height = Math.ceil(length(view[0]) / perRow);
    blocks = { perRow, perColumn, width, share };
    Object.assign(canvas, { width, height });
    const scale = shadeScale(share.filter((x) => x > 0), null, 1);
    const colours = ramp(), context = canvas.getContext("2d"), image = context.createImageData(width, height);
    share.forEach((x, i) => {
      image.data.set([...colours[Math.min(255, Math.round(255 * scale.at(x)))], 255], 4 * i);
    });
    context.putImageData(image, 0, 0);
    const ends = (side, places) => `${places[view[side][0]].position} to ${places[view[side][1] - 1].position}`;
    axes[0].textContent = `key ${ends(1, keys)}: what is looked at →`;
    axes[1].textContent = `query ${ends(0, queries)}: who looks →`;
    cross(null, null);
    events.shown(scale, perRow * perColumn);
  }

  function show(next, query) {
    weights = next;
    chosen = query;
    last = { q: null, row: null };
    draw();
  }
  return { show, cross, zoom };
}

// A variable along the tokens, or, by role, its parts on top of each other. data: {variable, places};
// events: choose(i). Handle: show({series: [Float32Array], chosen}).
export function line(element, data, events) {
  const { variable, places } = data, n = places.length, height = 40, stacked = variable.roles !== null;
  const svg = make("svg", { viewBox: `0 0 ${n} ${height}`, preserveAspectRatio: "none", role: "img",
    "aria-label": variable.label });
  const value = make("output", {}), roles = make("div", { class: "role-keys" });
  element.append(make("figure", { class: "line" },
    make("figcaption", {}, make("span", { title: variable.about }, variable.label), value), svg, roles));

  let parts = [], chosen = null, resting = "";
  const words = (i) => parts.map(({ role, series }) =>
    `${parts.length > 1 ? `${role} ` : ""}${measure(series[i], variable)}`).join(", ") || "–";
  const say = (i) => { value.textContent = i === null ? resting : `${named(places[i])} ${words(i)}`; };
  const at = (event) => under(event, svg.getBoundingClientRect(), n);
  svg.addEventListener("pointermove", (event) => say(at(event)));
  svg.addEventListener("pointerleave", () => say(chosen));
  svg.addEventListener("click", (event) => events.choose(at(event)));

  // One step a token: the area from what is below it, and, where nothing is stacked, its upper edge.
  function outline(series, floor, y) {
    let area = "", edge = "", inside = false;
    series.forEach((x, p) => {
      if (!Number.isFinite(x)) {
        inside = false;
        return;
      }
      const bottom = stacked ? floor[p] : 0, top = bottom + x;
      area += `M${p} ${y(bottom)}V${y(top)}H${p + 1}V${y(bottom)}Z`;
      edge += `${inside ? "L" : "M"}${p} ${y(top)}H${p + 1}`;
      inside = true;
      if (stacked) floor[p] = top;
    });
    return { area, edge };
  }

  return {
    show({ series, chosen: i }) {
      chosen = i;
      parts = series.map((one, r) => ({ role: variable.roles?.[r], series: one, hue: roleHue(variable.roles?.[r]) }))
        .filter((part) => !stacked || part.series.some((x) => x > 0));
      const all = parts.flatMap((part) => Array.from(part.series).filter(Number.isFinite));
      const tops = stacked ? places.map((_, p) => parts.reduce((sum, part) => sum + (part.series[p] || 0), 0)) : all;
      const order = Float64Array.from(tops).sort(), most = order.length ? order[order.length - 1] : 1;
      const low = all.length ? Math.min(0, smallest(all)) : 0;
      // One peak far above all else (a sink) would leave a flat line: then the peak leaves the drawing.
      const usual = order[Math.floor(0.98 * (order.length - 1))];
      const cut = !stacked && n > 20 && usual > 0 && most > 6 * usual;
      const high = cut ? 2 * usual : most > low ? most : low + 1;
      resting = stacked || !order.length ? "" : `median ${measure(order[order.length >> 1], variable)}`
        + (cut ? `, highest ${measure(most, variable)}, beyond the drawing` : "");

      const y = (x) => Math.max(-2, height - 1 - ((x - low) / (high - low)) * (height - 2)).toFixed(2);
      const floor = new Float64Array(n), thin = { "vector-effect": "non-scaling-stroke" };
      svg.replaceChildren(...parts.flatMap((part) => {
        const { area, edge } = outline(part.series, floor, y), filled = make("path", { d: area, class: "area" });
        if (!stacked) return [filled, make("path", { d: edge, class: "edge", ...thin })];
        filled.style.fill = part.hue;
        return [filled];
      }));
      if (i !== null) svg.append(make("path", { d: `M${i + 0.5} 0V${height}`, class: "here", ...thin }));
      roles.replaceChildren(...(stacked ? parts : []).map(({ role, hue }) => {
        const sign = make("i", { "aria-hidden": "true" });
        sign.style.background = hue;
        return make("span", {}, sign, role);
      }));
      say(i);
    },
  };
}

// The chosen head's numbers, each among all heads'. Handle: show([{variable, label, values [layer][head], layer, head}]).
export function numbers(element) {
  function among(values, own) {
    const all = values.flatMap((row) => Array.from(row)).filter(Number.isFinite), n = all.length;
    if (!n || !Number.isFinite(own)) return [make("span", {}, "not recorded")];
    const low = smallest(all), high = largest(all);
    if (high - low <= SAME * Math.max(Math.abs(low), Math.abs(high))) {
      return [make("span", {}, n > 1 ? "about the same in every head" : "the only head")];
    }
    const x = (value) => (2 + (96 * (value - low)) / (high - low)).toFixed(1);
    const thin = { "vector-effect": "non-scaling-stroke" };
    const svg = make("svg", { class: "strip", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      make("path", { d: all.map((value) => `M${x(value)} 1V9`).join(""), class: "others", ...thin }),
      make("path", { d: `M${x(own)} 0V10`, class: "own", ...thin }));
    const above = all.filter((value) => value > own).length, below = all.filter((value) => value < own).length;
    const rank = (before, end) => `${before ? `${ordinal(before + 1)} ` : ""}${end} of ${n}`;
    return [svg, make("span", {}, above <= below ? rank(above, "highest") : rank(below, "lowest"))];
  }
  return {
    show(rows) {
      element.replaceChildren(...rows.map(({ variable, label, values, layer, head }) => make("tr", {},
        make("th", { scope: "row", title: variable.about }, label),
        make("td", { class: "value" }, measure(values[layer][head], variable)),
        make("td", { class: "among" }, ...among(values, values[layer][head])))));
    },
  };
}

// Keys that are sinks, by layer. data: {layers, places}; events: choose(k).
// Handle: show([{key, found, share [layer], times [layer]}]), as the report found them.
export function sinks(element, data, events) {
  const { layers, places } = data;
  const mean = (values) => {
    const known = values.filter((x) => x !== null);
    return known.length ? known.reduce((sum, x) => sum + x, 0) / known.length : NaN;
  };
  const times = (x) => (x === null ? "–" : `${x >= 9.95 ? x.toFixed(0) : x.toFixed(1)}`);

  function cell(share, ratio, l) {
    const one = make("td", { class: "layer",
      title: `layer ${layers[l]}: ${percent(share ?? NaN)} of all attention, ${times(ratio)} times even attention` },
    share === null ? "" : percent(share));
    const { fill, ink } = paint(Math.sqrt(share ?? 0));
    one.style.background = fill;
    one.style.color = ink;
    return one;
  }

  return {
    show(all) {
      const found = all.filter((one) => one.found);
      if (!found.length) {
        const best = all[0], place = best && places[best.key], most = best && largest(best.times.map((x) => x ?? 0));
        element.replaceChildren(make("p", {}, !best ? "Nothing was recorded."
          : `No key stands out. What comes closest is ${named(place)} at ${place.position}: ${percent(mean(best.share))} of `
            + `all attention, at most ${times(most)} times what even attention would give a key of its place.`));
        return;
      }
      const column = (words, name) => make("th", { scope: "col", class: name }, words);
      const head = make("tr", {}, column("token"), column("place", "number"), column("of all", "number"),
        column("even ×", "number"), ...layers.map((layer) => column(String(layer), "layer")));
      const rows = found.map(({ key, share, times: ratios }) => {
        const place = places[key], words = place.image >= 0 || place.token === "" ? named(place) : visible(place.token);
        const button = make("button", { type: "button", onclick: () => events.choose(key) }, make("bdi", {}, words));
        const number = (words) => make("td", { class: "number" }, words);
        return make("tr", {}, make("th", { scope: "row" }, button), number(String(place.position)),
          number(percent(mean(share))), number(times(largest(ratios.map((x) => x ?? 0)))),
          ...share.map((x, l) => cell(x, ratios[l], l)));
      });
      const table = make("table", { class: "sinks" }, make("thead", {}, head), make("tbody", {}, ...rows));
      const scroll = { class: "scroll", tabindex: "0", role: "region", "aria-label": "Sinks by layer" };
      element.replaceChildren(make("div", scroll, table));
    },
  };
}
