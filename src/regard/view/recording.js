// A recording as the views read it. `header` is the report's JSON; `read(block)` promises a block's bytes, inflated.

const SQUARES = Float32Array.from({ length: 256 }, (_, v) => (v / 255) ** 2);

// Some of the map: `each(q, visit(key, weight))` goes over a row, and says whether there is one.
class Weights {
  // 1 for each query that has a row.
  there() {
    return (this.has ??= Uint8Array.from({ length: this.queries }, (_, q) => (this.each(q, () => {}) ? 1 : 0)));
  }
  // Float32Array over keys, or null.
  row(q) {
    const out = new Float32Array(this.keys);
    return this.each(q, (key, weight) => { out[key] = weight; }) ? out : null;
  }
  // Share of a row on each block of keys, mean over the block's rows: queries from..to in blocks of `perRow`.
  pool([q0, q1], [k0, k1], perRow, perColumn) {
    const height = Math.ceil((q1 - q0) / perRow), width = Math.ceil((k1 - k0) / perColumn);
    const out = new Float32Array(width * height), rows = new Uint32Array(height);
    for (let q = q0; q < q1; q++) {
      const r = Math.floor((q - q0) / perRow);
      const any = this.each(q, (k, weight) => {
        if (k >= k0 && k < k1) out[r * width + Math.floor((k - k0) / perColumn)] += weight;
      });
      if (any) rows[r]++;
    }
    return out.map((sum, i) => sum / Math.max(1, rows[Math.floor(i / width)]));
  }
}

// One head's weights, every one of them: rows of 8-bit roots one after the other, row q with its first lengths[q] keys.
class DenseWeights extends Weights {
  constructor(bytes, start, shape) {
    super();
    Object.assign(this, shape, { bytes, start });
  }
  // A row of zeros only is a row that was not there.
  each(q, visit) {
    const from = this.start + this.starts[q];
    let any = false;
    for (let k = 0; k < this.lengths[q]; k++) {
      const v = this.bytes[from + k];
      if (v) { any = true; visit(k, SQUARES[v]); }
    }
    return any;
  }
  column(k) {
    const out = new Float32Array(this.queries);
    for (let q = 0; q < this.queries; q++) {
      if (k < this.lengths[q]) out[q] = SQUARES[this.bytes[this.start + this.starts[q] + k]];
    }
    return out;
  }
}

// One head's largest weights of each row. The block's planes: rank, then (weight, key byte 0, 1, ..), then head, query.
class TopWeights extends Weights {
  constructor(bytes, head, shape) {
    super();
    Object.assign(this, shape, { bytes, head });
    this.plane = this.heads * this.queries;
  }
  each(q, visit) {
    for (let rank = 0; rank < this.k; rank++) {
      let at = rank * (1 + this.width) * this.plane + this.head * this.queries + q;
      const weight = this.bytes[at];
      if (!weight) return rank > 0;
      let key = 0;
      for (let byte = 0; byte < this.width; byte++) key += this.bytes[at += this.plane] * 256 ** byte;
      visit(key, SQUARES[weight]);
    }
    return this.k > 0;
  }
  column(k) {
    const out = new Float32Array(this.queries);
    for (let q = 0; q < this.queries; q++) this.each(q, (key, weight) => { if (key === k) out[q] = weight; });
    return out;
  }
}

// The mean of several heads; heads without the row are left out.
class MeanWeights extends Weights {
  constructor(parts) {
    super();
    Object.assign(this, { parts, queries: parts[0].queries, keys: parts[0].keys });
  }
  each(q, visit) {
    const parts = this.parts.filter((part) => part.there()[q]);
    for (const part of parts) part.each(q, (key, weight) => visit(key, weight / parts.length));
    return parts.length > 0;
  }
  row(q) { return meanOf(this.parts.map((part) => part.row(q))); }
  // Each query's mean is over the heads that have its row, as row(q)'s is.
  column(k) {
    const sum = new Float64Array(this.parts[0].queries), count = new Uint32Array(sum.length);
    for (const part of this.parts) {
      const one = part.column(k), there = part.there();
      for (let q = 0; q < sum.length; q++) { sum[q] += one[q]; count[q] += there[q]; }
    }
    return sum.map((x, q) => (count[q] ? x / count[q] : 0));
  }
}

// A side's tokens of one sample: {position, token, role, image, row, column}, one a place.
function places(side, sample) {
  return side.position.map((position, i) => ({
    position, token: side.token[sample][i], role: side.role[sample][i],
    image: side.image ? side.image[sample][i] : -1,
    row: side.image ? side.row[sample][i] : -1, column: side.image ? side.column[sample][i] : -1,
  }));
}

class Sample {
  constructor(stack, header, sample, read) {
    Object.assign(this, { stack, header, sample, read });
    this.queries = places(header.query, sample);
    this.keys = places(header.key, sample);
    this.kept = new Map();
  }

  once(key, work) {
    if (!this.kept.has(key)) this.kept.set(key, work());
    return this.kept.get(key);
  }

  // Promise of the weights of all heads of a layer (an index), [] where the file has none.
  layer(index) {
    const weights = this.header.weights;
    if (!weights) return Promise.resolve([]);
    return this.once(`layer ${index}`, async () => {
      const bytes = await this.read(weights.blocks[this.sample][index]);
      const heads = this.header.heads.length;
      if (weights.form === "top") {
        const { k, width } = weights, queries = this.queries.length, keys = this.keys.length;
        return this.header.heads.map((_, head) => new TopWeights(bytes, head, { heads, queries, keys, k, width }));
      }
      const shape = this.shape(weights.triangle);
      return this.header.heads.map((_, head) => new DenseWeights(bytes, head * shape.size, shape));
    });
  }

  // Where each dense row starts and ends. A causal row ends with the query's own position.
  shape(triangle) {
    const position = this.header.key.position, starts = [], lengths = [];
    let size = 0;
    for (const { position: own } of this.queries) {
      let length = position.length;
      if (triangle) while (length && position[length - 1] > own) length--;
      starts.push(size);
      lengths.push(length);
      size += length;
    }
    return { starts, lengths, size, queries: this.queries.length, keys: this.keys.length };
  }

  // Promise of weights with row(q) and column(k), or null. Scope: head, layer, all, rollout.
  async weights(scope, layer, head) {
    if (scope === "rollout") {
      if (!this.header.rollout.blocks) return null;
      return this.once("rollout", async () => {
        const bytes = await this.read(this.header.rollout.blocks[this.sample]);
        return new DenseWeights(bytes, 0, this.shape(this.header.rollout.triangle));
      });
    }
    if (!this.header.weights) return null;
    if (scope === "head") return (await this.layer(layer))[head];
    if (scope === "layer") return new MeanWeights(await this.layer(layer));
    const layers = await Promise.all(this.header.layers.map((_, index) => this.layer(index)));
    return new MeanWeights(layers.flat());
  }

  // Promise of a variable's numbers: series(layer, head, role) is a Float32Array along its dim, with NaN.
  statistic(variable) {
    return this.once(`statistic ${variable.name}`, async () => {
      const bytes = await this.read(variable.block);
      const codes = variable.bits === 16 ? new Uint16Array(bytes.buffer) : bytes;
      const none = 2 ** variable.bits - 1, step = (variable.high - variable.low) / (none - 1);
      const length = variable.along === "query" ? this.queries.length : this.keys.length;
      const pooled = variable.pooled, kept = Math.ceil(length / pooled); // so many neighbours share a number
      const roles = variable.roles?.length ?? 1, heads = this.header.heads.length, layers = this.header.layers.length;
      return (layer, head, role = 0) => {
        const from = (((this.sample * layers + layer) * heads + head) * roles + role) * kept;
        return Float32Array.from({ length }, (_, i) => {
          const code = codes[from + Math.floor(i / pooled)];
          return code === none ? NaN : variable.low + code * step;
        });
      };
    });
  }

  // Promise of a variable along its dim for a scope: nan-mean over the heads it takes in.
  async series(variable, scope, layer, head, role = 0) {
    const series = await this.statistic(variable);
    if (scope === "head") return series(layer, head, role);
    const layers = scope === "layer" ? [layer] : this.header.layers.keys();
    let sum = null, count = null;
    for (const l of layers) {
      for (let h = 0; h < this.header.heads.length; h++) {
        const one = series(l, h, role);
        sum ??= new Float64Array(one.length);
        count ??= new Uint32Array(one.length);
        for (let i = 0; i < one.length; i++) if (one[i] === one[i]) { sum[i] += one[i]; count[i]++; }
      }
    }
    return Float32Array.from(sum, (s, i) => (count[i] ? s / count[i] : NaN));
  }

  // Promise of a variable's numbers by [layer][head], the nan-mean over everything else.
  async heads(variable, role = 0) {
    const all = await this.once("heads", async () => new Float32Array((await this.read(this.header.atlas)).buffer));
    const layers = this.header.layers.length, heads = this.header.heads.length;
    const from = ((variable.atlas + role) * this.header.samples + this.sample) * layers * heads;
    return this.header.layers.map((_, l) => all.subarray(from + l * heads, from + (l + 1) * heads));
  }
}

export class Recording {
  constructor(header, read) {
    const kept = new Map();
    const once = (block) => kept.get(block) ?? kept.set(block, read(block)).get(block);
    this.stacks = header.stacks;
    this.pictures = header.pictures;
    this.starts = header.starts; // [layer, head] a stack, indices
    this.sink = header.sink; // the least that counts: share of all attention, and times even attention
    this.samples = header.stacks.map((stack, i) =>
      Array.from({ length: stack.samples }, (_, sample) => new Sample(i, stack, sample, once)));
  }
}

// The mean of arrays, leaving out null; null if none is left.
export function meanOf(rows) {
  let out = null, n = 0;
  for (const row of rows) {
    if (!row) continue;
    n++;
    out ??= new Float64Array(row.length);
    for (let i = 0; i < row.length; i++) out[i] += row[i];
  }
  return out?.map((x) => x / n) ?? null;
}

// Base64 of raw deflate, as the report holds it.
export async function inflate(base64) {
  const packed = Uint8Array.fromBase64 ? Uint8Array.fromBase64(base64)
    : Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
