// A picture under its patches: where the chosen token looks, for one head large and for its neighbours small.

import { ramp } from "./colour.js";
import { make, named } from "./dom.js";

// Draw values by patch onto a canvas of one pixel a patch. With veil, low patches let the picture through.
function draw(canvas, grid, cells, values, high, veil) {
  const [rows, columns] = grid;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows), heat = ramp("heat");
  for (const { i, row, column } of cells) {
    const value = values?.[i];
    const at = value > 0 ? Math.min(1, value / high) : 0;
    const alpha = veil ? Math.round(255 * (0.66 - 0.1 * at)) : 255;
    image.data.set([...heat[Math.round(255 * at)], alpha], 4 * (row * columns + column));
  }
  context.putImageData(image, 0, 0);
}

// Small maps in a row. pick(value). Handle: show([{label, share, values | null, high, value, title}]); mark(value).
function thumbnails(name, { grid: [rows, columns], cells, ratio }, pick) {
  const element = make("div", { class: "thumbs", role: "group", "aria-label": name });
  let thumbs = [];
  return {
    element,
    show(next) {
      if (thumbs.length !== next.length) {
        thumbs = next.map(() => {
          const sheet = make("canvas", { width: columns, height: rows, "aria-hidden": "true" });
          const one = { sheet, label: make("bdi", {}), share: make("span", { class: "share-of" }) };
          sheet.style.aspectRatio = ratio;
          one.button = make("button", { type: "button", onclick: () => pick(one.value) }, sheet, one.label, one.share);
          return one;
        });
        element.replaceChildren(...thumbs.map((one) => one.button));
      }
      next.forEach((thumb, t) => {
        const one = thumbs[t];
        one.value = thumb.value;
        one.label.textContent = thumb.label;
        one.share.textContent = thumb.share;
        one.button.disabled = !thumb.values;
        one.button.title = thumb.title ?? "";
        draw(one.sheet, [rows, columns], cells, thumb.values, thumb.high, false);
      });
    },
    mark(value) {
      for (const one of thumbs) one.button.setAttribute("aria-pressed", String(one.value === value));
    },
  };
}

const ratioOf = ({ source, width, height, grid: [rows, columns] }) =>
  (source ? `${width} / ${height}` : `${columns} / ${rows}`);

// A map for each of several words; data and handle as of the thumbnails.
export function strip(data, name, pick) {
  return thumbnails(name, { ...data, ratio: ratioOf(data) }, pick);
}

// data: {source | null, width, height, image (its number), grid: [rows, columns], cells: [{i, row, column}] with i an
// item, name, format(value)}.
// events: choose(i), clear(), pick(thumb value).
// Handle: show({values, high, mark: i | null, caption, thumbs (see above), chosen: a thumb's value}).
export function picture(element, data, events) {
  const [rows, columns] = data.grid;
  const sheet = () => make("canvas", { width: columns, height: rows, "aria-hidden": "true" });
  const canvas = sheet(), mark = make("div", { class: "patch-mark", hidden: true });
  const pointed = make("div", { class: "patch-mark faint", hidden: true });
  const frame = make("div", { class: "picture-frame", tabindex: "0", role: "application",
    "aria-label": `${data.name}: ${rows} by ${columns} patches; arrow keys move, Enter chooses a patch, Escape clears` });
  if (data.source) frame.append(make("img", { src: data.source, alt: data.name, draggable: "false" }));
  frame.append(canvas, mark, pointed);
  frame.style.aspectRatio = ratioOf(data);
  const caption = make("p", { class: "readout", "aria-live": "polite" });
  const veil = make("button", { type: "button", class: "plain", "aria-pressed": "false", onclick: () => {
    canvas.hidden = !canvas.hidden;
    veil.setAttribute("aria-pressed", String(canvas.hidden));
  } }, "Show the picture alone");
  const heads = thumbnails("Heads of this layer", { ...data, ratio: ratioOf(data) }, events.pick);
  element.append(make("div", { class: "picture" },
    make("div", { class: "picture-main" }, frame, caption, data.source ? veil : null), heads.element));

  const byPlace = new Map(data.cells.map((cell) => [cell.row * columns + cell.column, cell.i]));
  const placeOf = new Map(data.cells.map((cell) => [cell.i, cell]));
  const put = (box, i) => {
    const cell = placeOf.get(i);
    box.hidden = !cell;
    if (!cell) return;
    box.style.left = `${(100 * cell.column) / columns}%`;
    box.style.top = `${(100 * cell.row) / rows}%`;
    box.style.width = `${100 / columns}%`;
    box.style.height = `${100 / rows}%`;
  };
  const at = (event) => {
    const box = frame.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    return byPlace.get(row * columns + column) ?? null;
  };
  let words = "", shown = null, cursor = null;
  const say = (i) => {
    put(pointed, i);
    const cell = placeOf.get(i);
    caption.textContent = cell ? `${named({ ...cell, image: data.image })}: ${data.format(shown?.[i])}` : words;
  };
  frame.addEventListener("pointermove", (event) => say(at(event)));
  frame.addEventListener("pointerleave", () => say(null));
  frame.addEventListener("click", (event) => {
    const i = at(event);
    if (i !== null) events.choose(cursor = i);
  });
  frame.addEventListener("blur", () => say(null));
  frame.addEventListener("keydown", (event) => {
    const cell = placeOf.get(cursor) ?? { row: 0, column: 0 };
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      const row = cell.row + step[0], column = cell.column + step[1];
      const next = column >= 0 && column < columns ? byPlace.get(row * columns + column) : undefined;
      say(cursor = next ?? cursor ?? data.cells[0].i);
    } else if (event.key === "Escape") events.clear();
    else if (event.key !== "Enter" && event.key !== " ") return;
    else if (cursor !== null) events.choose(cursor);
    event.preventDefault();
  });

  return {
    show({ values, high, mark: i, caption: remark, thumbs, chosen }) {
      shown = values;
      draw(canvas, data.grid, data.cells, values, high, Boolean(data.source));
      put(mark, i);
      words = remark;
      say(null);
      heads.show(thumbs);
      heads.mark(chosen);
    },
  };
}
