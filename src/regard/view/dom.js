// Elements and words. Nothing here or elsewhere in these modules parses text as markup: strings become text nodes.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "circle", "line", "rect", "g", "text", "image"]);

export function make(tag, attributes = {}, ...children) {
  const element = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// A part of the page with its title; its tools stand beside that, in `head`.
export function panel(name, title, ...children) {
  const heading = make("h2", {}, title), head = make("div", { class: "card-head" }, heading);
  return { heading, head, element: make("section", { class: `card ${name}` }, head, ...children) };
}

// A row of buttons of which one is pressed: {show(value), element}. An option is {value, label, disabled, title}.
export function choice(label, options, chosen, changed) {
  const buttons = options.map((option) => make("button", {
    type: "button", "aria-pressed": String(option.value === chosen), disabled: option.disabled, title: option.title,
    onclick: () => changed(option.value),
  }, option.label));
  const show = (value) => buttons.forEach((button, i) => {
    button.setAttribute("aria-pressed", String(options[i].value === value));
  });
  return { element: make("div", { class: "choice", role: "group", "aria-label": label }, ...buttons), show };
}

// A labelled select. An option is {value, label, group}; options with the same group follow one another.
export function menu(label, options, chosen, changed) {
  const select = make("select", { onchange: () => changed(options[select.selectedIndex].value) });
  let group = null;
  for (const option of options) {
    const entry = make("option", { selected: option.value === chosen }, option.label);
    if (option.group && group?.label !== option.group) {
      group = make("optgroup", { label: option.group });
      select.append(group);
    }
    (option.group ? group : select).append(entry);
  }
  return make("label", { class: "menu" }, make("span", {}, label), select);
}

// A token as one line: what cannot be seen gets a sign.
export function visible(token) {
  if (token === "") return "∅";
  return token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍")
    .replace(/^ +| +$/g, (blanks) => "·".repeat(blanks.length))
    .replace(/[\p{Cc}\p{Zl}\p{Zp}\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/gu,
      (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

export const quote = (token) => `‘${visible(token).replace(/^·+/, "")}’`;

// What to call a place in a sentence.
export function named({ token, role, position, image, row, column }, short = false) {
  if (image < 0) return token === "" ? `${role} ${position}` : quote(token);
  return `${short ? "" : image ? `picture ${image + 1}, patch ` : "patch "}row ${row + 1}, column ${column + 1}`;
}

// Two digits: as many as 8-bit weights carry.
export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  const points = 100 * share;
  if (points === 0) return "0%";
  if (points < 0.01) return "<0.01%";
  return `${points >= 9.95 ? points.toFixed(0) : points >= 0.995 ? points.toFixed(1) : points.toFixed(2)}%`;
}

export function number(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  return value.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : size >= 0.9995 ? 2 : 3); // what rounds to 1 is written as 1 is
}

// The number of a variable with its units.
export function measure(value, variable) {
  const units = variable.units && variable.units !== "1" ? ` ${variable.units}` : "";
  return number(value) + (Number.isFinite(value) ? units : "");
}

// The first letter small, unless the word is an abbreviation.
export const lowered = (words) => (/^[A-Z][a-z]/.test(words) ? words[0].toLowerCase() + words.slice(1) : words);

export function ordinal(n) {
  const tail = n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] ?? "th";
  return `${n}${tail}`;
}
