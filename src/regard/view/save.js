// A card, and it as a drawing of its own: what stands on the page, element by element, as SVG, and from that as PNG.

import { make, panel } from "./dom.js";

const SKIPPED = ".choice, .menu, .save, .plain, .hint, select";
const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const safe = (words) => String(words).replace(/[&<>"]/g, (c) => escapes[c]).replace(/[\0-\x08\x0b\x0c\x0e-\x1f]/g, " ");
const tag = (name, attributes, inner = "") => `<${name}${Object.entries(attributes)
  .map(([key, value]) => ` ${key}="${safe(value)}"`).join("")}>${inner}</${name}>`;
const clear = (colour) => !colour || colour === "transparent" || /,\s*0\)$|\/\s*0\)$/.test(colour);

// The element and all in it as the text of an SVG file.
export function drawing(element) {
  const frame = element.getBoundingClientRect(), out = [], measured = document.createElement("canvas").getContext("2d");
  const at = (box) => ({ x: +(box.left - frame.left).toFixed(2), y: +(box.top - frame.top).toFixed(2) });
  const rect = (x, y, width, height, style) => {
    if (width > 0 && height > 0) out.push(tag("rect", { x, y, width, height, ...style }));
  };

  function box(node, style) {
    for (const one of node.getClientRects()) {
      const { x, y } = at(one), round = parseFloat(style.borderTopLeftRadius) || 0, { width, height } = one;
      if (!clear(style.backgroundColor)) rect(x, y, width, height, { fill: style.backgroundColor, rx: round });
      const [, colour, drop] = style.boxShadow.match(/^(rgba?\([^)]*\)|color\([^)]*\)) 0px ([\d.]+)px 0px 0px$/) ?? [];
      if (colour) rect(x, y + height, width, Number(drop), { fill: colour });
      const sides = ["Top", "Right", "Bottom", "Left"].map((side) =>
        (style[`border${side}Style`] === "none" ? 0 : parseFloat(style[`border${side}Width`]) || 0));
      if (sides.every((size) => size > 0 && size === sides[0])) {
        const size = sides[0];
        rect(x + size / 2, y + size / 2, width - size, height - size,
          { fill: "none", stroke: style.borderTopColor, "stroke-width": size, rx: round });
      } else {
        const [top, right, bottom, left] = sides;
        rect(x, y, width, top, { fill: style.borderTopColor });
        rect(x + width - right, y, right, height, { fill: style.borderRightColor });
        rect(x, y + height - bottom, width, bottom, { fill: style.borderBottomColor });
        rect(x, y, left, height, { fill: style.borderLeftColor });
      }
      const ring = style.outlineStyle === "none" || style.outlineStyle === "auto" ? 0 : parseFloat(style.outlineWidth);
      if (ring) {
        const off = parseFloat(style.outlineOffset) + ring / 2;
        rect(x - off, y - off, width + 2 * off, height + 2 * off,
          { fill: "none", stroke: style.outlineColor, "stroke-width": ring, rx: round });
      }
    }
  }

  // A text node, a line of it at a time.
  function words(node, style) {
    const range = document.createRange(), lines = [];
    range.selectNodeContents(node);
    const all = range.getClientRects();
    if (!all.length) return;
    if (all.length === 1) lines.push([node.data, all[0]]);
    else {
      for (let i = 0; i < node.length; i++) {
        range.setStart(node, i);
        range.setEnd(node, i + 1);
        const one = range.getBoundingClientRect(), last = lines[lines.length - 1];
        if (!one.width) continue;
        if (last && Math.abs(last[1].top - one.top) < 2) {
          last[0] += node.data[i];
          const left = Math.min(last[1].left, one.left), right = Math.max(last[1].right, one.right);
          last[1] = { left, right, top: last[1].top, width: right - left, height: one.height };
        } else lines.push([node.data[i], one]);
      }
    }
    measured.font = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    const ascent = measured.measureText("x").fontBoundingBoxAscent;
    const font = { fill: style.color, "font-family": style.fontFamily, "font-size": style.fontSize,
      "font-weight": style.fontWeight, "font-style": style.fontStyle, "xml:space": "preserve", style: "white-space:pre" };
    for (const [line, where] of lines) {
      if (!line.trim() || !where.width) continue;
      const { x, y } = at(where);
      if (style.writingMode.startsWith("vertical")) {
        const down = x + where.width - ascent;
        out.push(tag("text", { x: 0, y: 0, transform: `translate(${down} ${y}) rotate(90)`, ...font }, safe(line)));
      } else {
        const length = { textLength: where.width.toFixed(2), lengthAdjust: "spacingAndGlyphs" };
        out.push(tag("text", { x, y: (y + ascent).toFixed(2), ...length, ...font }, safe(line)));
      }
    }
  }

  // Paths of a chart, with the colours that the page's style gives them.
  function chart(node) {
    const { x, y } = at(node.getBoundingClientRect()), { width, height } = node.getBoundingClientRect();
    const inner = Array.from(node.querySelectorAll("path"), (path) => {
      const style = getComputedStyle(path);
      return tag("path", { d: path.getAttribute("d"), fill: style.fill, "fill-opacity": style.fillOpacity,
        stroke: style.stroke, "stroke-opacity": style.strokeOpacity, "stroke-width": style.strokeWidth,
        "vector-effect": "non-scaling-stroke" });
    });
    out.push(tag("svg", { x, y, width, height, viewBox: node.getAttribute("viewBox"), preserveAspectRatio: "none" },
      inner.join("")));
  }

  function walk(node) {
    if (node.nodeType === Node.TEXT_NODE) {
      words(node, getComputedStyle(node.parentElement));
      return;
    }
    if (node.nodeType !== Node.ELEMENT_NODE || node.matches(SKIPPED)) return;
    const style = getComputedStyle(node);
    if (style.display === "none" || style.visibility === "hidden" || style.opacity === "0") return;
    if (node.localName === "svg") {
      chart(node);
      return;
    }
    box(node, style);
    if (node.localName === "canvas" || node.localName === "img") {
      const { width, height } = node.getBoundingClientRect();
      const source = node.localName === "img" ? node.src : node.width && node.height ? node.toDataURL() : null;
      const look = `image-rendering:${style.imageRendering};filter:${style.filter}`;
      if (source) out.push(tag("image", { ...at(node.getBoundingClientRect()), width, height, href: source,
        preserveAspectRatio: "none", style: look }));
      return;
    }
    node.childNodes.forEach(walk);
  }

  walk(element);
  const { width, height } = frame, paper = getComputedStyle(document.documentElement).backgroundColor;
  const size = { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}` };
  return tag("svg", size, tag("rect", { width, height, fill: paper }) + out.join(""));
}

async function painted(svg) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await image.decode();
  const times = Math.min(2, 8000 / Math.max(image.width, image.height)); // what a canvas can hold
  const canvas = make("canvas", { width: Math.round(times * image.width), height: Math.round(times * image.height) });
  const context = canvas.getContext("2d");
  context.scale(times, times);
  context.drawImage(image, 0, 0);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

// Buttons that save a card as it stands, the hidden part of its scrolled boxes too.
function saveButtons(element, name) {
  async function save(kind) {
    element.classList.add("whole");
    const svg = drawing(element);
    element.classList.remove("whole");
    const blob = kind === "png" ? await painted(svg) : new Blob([svg], { type: "image/svg+xml" });
    const where = location.hash.replace(/^#/, "").replace(/[^\w-]+/g, "-");
    const link = make("a", { href: URL.createObjectURL(blob), download: `${[name, where].filter(Boolean).join("-")}.${kind}` });
    link.click();
    URL.revokeObjectURL(link.href);
  }
  const button = (kind, label) => make("button", { type: "button", title: `Save this as ${label}`,
    "aria-label": `Save this as ${label}`, onclick: () => save(kind) }, label);
  return make("div", { class: "save" }, button("svg", "SVG"), button("png", "PNG"));
}

// A panel with buttons that save it.
export function card(name, title, ...children) {
  const made = panel(name, title, ...children);
  made.head.append(saveButtons(made.element, name.split(" ")[0]));
  return made;
}
