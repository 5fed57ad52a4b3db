// The tokens of a sample as items of a text. In self attention queries and keys are the same tokens: one text of all
// positions. In cross attention there are two.

// An item is {position, token, role, image, row, column, query, key}: with its index on each side, or -1. The token that
// was generated last is on neither side, `unread`.
export class Places {
  constructor(sample, cross) {
    this.cross = cross;
    if (cross) {
      this.query = sample.queries.map((place, i) => ({ ...place, query: i, key: -1 }));
      this.key = sample.keys.map((place, i) => ({ ...place, query: -1, key: i }));
    } else {
      const all = new Map(sample.keys.map((place, i) => [place.position, { ...place, query: -1, key: i }]));
      sample.queries.forEach((place, i) => {
        if (all.has(place.position)) all.get(place.position).query = i;
        else all.set(place.position, { ...place, query: i, key: -1 });
      });
      this.query = this.key = [...all.values()].sort((a, b) => a.position - b.position);
    }
    const last = sample.header.unread?.[sample.sample], end = this.query[this.query.length - 1];
    if (last !== undefined && end) {
      this.query.push({ position: end.position + 1, token: last, role: "generated", image: -1, row: -1, column: -1,
        query: -1, key: -1, unread: true });
    }
    // Index of a query or key -> its item.
    this.itemOf = { query: [], key: [] };
    for (const side of ["query", "key"]) {
      this[side].forEach((item, i) => { if (item[side] >= 0) this.itemOf[side][item[side]] = i; });
    }
  }

  // Numbers by query or key as numbers by item, NaN where there is none; null stays null.
  byItem(values, side) {
    if (!values) return null;
    const out = new Float32Array(this[side].length).fill(NaN);
    values.forEach((value, index) => { out[this.itemOf[side][index]] = value; });
    return out;
  }

  // The generated tokens as items' indices: each with that of the token before it, from whose row it was chosen.
  generated() {
    const at = new Map(this.query.map(({ position }, i) => [position, i]));
    return this.query.flatMap(({ role, position }, i) => (role === "generated"
      ? [{ own: i, before: at.get(position - 1) ?? -1 }] : []));
  }

  // What the page's address calls an item: its position, "k12" for a key of cross attention.
  address(side, i) {
    return (this.cross && side === "key" ? "k" : "") + this[side][i].position;
  }

  // {side, i} of an address, or null.
  find(address) {
    if (address === null) return null;
    const isKey = this.cross && address.startsWith("k"), side = isKey ? "key" : "query";
    const i = this[side].findIndex((item) => item.position === Number(isKey ? address.slice(1) : address));
    return i < 0 ? null : { side, i };
  }
}
