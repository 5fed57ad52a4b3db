// The atlas of differences: of each head, a statistic of one recording less that of another.

import { atlas } from "./atlas.js";
import { legend, straightScale } from "./colour.js";
import { make, measure, menu } from "./dom.js";

// before, after: Recordings. Draws stacks that both have, with the same layers and heads. Resolves once it is drawn.
export async function differences(element, before, after) {
  const pairs = before.stacks.flatMap((stack, i) => {
    const j = after.stacks.findIndex(({ name }) => name === stack.name);
    const same = j >= 0 && ["layers", "heads"].every((part) => String(after.stacks[j][part]) === String(stack[part]));
    return same ? [{ name: stack.name, a: before.samples[i][0], b: after.samples[j][0], stack, other: after.stacks[j] }] : [];
  });
  if (!pairs.length) {
    element.replaceChildren(make("p", { class: "note" }, "The two have no stack of the same layers and heads."));
    return;
  }
  const options = pairs.flatMap((pair, p) => pair.stack.variables.flatMap((variable) => {
    const twin = pair.other.variables.find(({ name }) => name === variable.name);
    if (!twin) return [];
    return (variable.roles ?? [null]).flatMap((role, r) => {
      const other = role === null ? 0 : (twin.roles ?? []).indexOf(role);
      return other < 0 ? [] : [{ value: `${p}/${variable.name}/${r}`, pair, variable, twin, r, other,
        label: role === null ? variable.label : `${variable.label}: ${role}`,
        group: pairs.length > 1 ? pair.name.replaceAll("_", " ") : null }];
    });
  }));
  const box = make("div", {}), readout = make("p", { class: "readout", "aria-live": "polite" }), key = make("div", { class: "key" });
  async function draw(option) {
    const { pair, variable, twin, r, other } = option, { layers, heads } = pair.stack;
    const [a, b] = [await pair.a.heads(variable, r), await pair.b.heads(twin, other)];
    const values = a.map((row, l) => Array.from(row, (x, h) => b[l][h] - x));
    const extreme = Math.max(0, ...values.flat().filter(Number.isFinite).map(Math.abs));
    // Symmetric, so that no change is the paper's own colour.
    const scale = extreme > 1e-9 ? straightScale([...values.flat(), extreme, -extreme]) : straightScale([]);
    const words = (l, h) => {
      const d = values[l][h], sign = d > 0 ? "+" : "";
      return `Layer ${layers[l]}, head ${heads[h]}: ${measure(a[l][h], variable)} → ${measure(b[l][h], variable)} (${sign}${measure(d, variable)})`;
    };
    box.replaceChildren();
    let at = [0, 0];
    values.forEach((row, l) => row.forEach((x, h) => { if (Math.abs(x) > Math.abs(values[at[0]][at[1]] || 0)) at = [l, h]; }));
    const say = (l, h) => { readout.textContent = l === null ? `Most: ${words(...at)}` : words(l, h); };
    atlas(box, { layers, heads, sites: pair.stack.sites }, { choose: say, look: say })
      .show({ values, scale, words, layer: -1, head: -1 });
    say(null);
    key.replaceChildren(extreme > 1e-9 ? legend(scale, (x) => measure(x, variable), "After less before.") : make("p", {}, "No head changed."));
  }
  element.replaceChildren(menu("Difference of", options, options[0].value, (value) =>
    draw(options.find((option) => option.value === value))), box, readout, key);
  await draw(options[0]);
}
