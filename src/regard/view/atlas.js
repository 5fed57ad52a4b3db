// Every head of a stack as a cell: layers down, heads across.

import { paint } from "./colour.js";
import { make } from "./dom.js";

// data: {layers, heads, sites}, or other rows and columns: {layers, heads, axes: {label, down, across}}, the columns words;
// events: choose(layer, head), look(layer, head | null) with indices.
// Handle: show({values [layer][head], scale, words(layer, head), layer, head}).
export function atlas(element, data, events) {
  const { layers, heads } = data, axes = data.axes ?? { label: "Heads: layers down, heads across", down: "layer", across: "head" };
  const every = data.axes ? 1 : heads.length > 40 ? 8 : heads.length > 20 ? 4 : heads.length > 12 ? 2 : 1;
  const everyLayer = layers.length > 40 ? 4 : layers.length > 24 ? 2 : 1;
  const cells = [];
  const grid = make("div", { class: data.axes ? "atlas worded" : "atlas", role: "grid", "aria-label": axes.label });
  grid.style.setProperty("--heads", heads.length);
  const top = make("div", { role: "row", class: "atlas-row" },
    make("span", { role: "columnheader", "aria-label": axes.down }));
  heads.forEach((head, h) => top.append(make("span", { role: "columnheader" }, h % every ? "" : String(head))));
  grid.append(top);
  layers.forEach((layer, l) => {
    const row = make("div", { role: "row", class: "atlas-row" },
      make("span", { role: "rowheader", title: data.sites?.[l] }, l % everyLayer ? "" : String(layer)));
    cells.push(heads.map((_, h) => {
      const cell = make("span", { role: "gridcell", class: "cell", tabindex: "-1", "data-layer": l, "data-head": h });
      row.append(cell);
      return cell;
    }));
    grid.append(row);
  });
  const axis = (way, words) => make("span", { class: `axis ${way}`, "aria-hidden": "true" }, words);
  element.append(make("div", { class: "atlas-frame" }, axis("across", `${axes.across} →`), axis("down", `${axes.down} →`), grid));

  const place = (target) => (target.dataset?.layer ? [Number(target.dataset.layer), Number(target.dataset.head)] : null);
  let home = null;
  const rest = (cell) => {
    if (home) home.tabIndex = -1;
    (home = cell).tabIndex = 0;
  };
  const on = (name, act) => grid.addEventListener(name, (event) => {
    const at = place(event.target);
    if (at) act(...at);
  });
  on("click", events.choose);
  on("pointerover", events.look);
  grid.addEventListener("pointerleave", () => events.look(null));
  grid.addEventListener("focusin", (event) => {
    const at = place(event.target);
    if (!at) return;
    rest(event.target);
    events.look(...at);
  });
  grid.addEventListener("focusout", () => events.look(null));
  grid.addEventListener("keydown", (event) => {
    const at = place(event.target);
    if (!at) return;
    let [l, h] = at;
    if (event.key === "Enter" || event.key === " ") events.choose(l, h);
    else if (event.key === "ArrowUp") l--;
    else if (event.key === "ArrowDown") l++;
    else if (event.key === "ArrowLeft") h--;
    else if (event.key === "ArrowRight") h++;
    else if (event.key === "Home") h = 0;
    else if (event.key === "End") h = heads.length - 1;
    else if (event.key === "PageUp") l = 0;
    else if (event.key === "PageDown") l = layers.length - 1;
    else return;
    event.preventDefault();
    cells[l]?.[h]?.focus();
  });

  return {
    show({ values, scale, words, layer, head }) {
      cells.forEach((row, l) => row.forEach((cell, h) => {
        const value = values[l][h], known = Number.isFinite(value);
        cell.classList.toggle("unknown", !known);
        cell.style.background = known ? paint(scale.at(value), scale.kind).fill : "";
        const chosen = l === layer && h === head;
        cell.classList.toggle("chosen", chosen);
        cell.setAttribute("aria-selected", String(chosen));
        cell.setAttribute("aria-label", words(l, h));
        if (chosen && document.activeElement?.closest(".atlas") !== grid) rest(cell);
      }));
      if (!home && cells[0]?.length) rest(cells[0][0]); // where none is chosen, Tab comes to the first
    },
  };
}
