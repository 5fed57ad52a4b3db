// Attention with its reductions in one pass over query-key blocks, and its backward pass. Compiled once for each
// instruction set, with REGARD_ISA its name. docs/kernel.md draws how it works.
//
// Words: a *panel* is PN keys, stored [dim][PN] so that a tile of scores needs no horizontal sums; a *block* is up to
// BQ query rows that are worked on together; a *chunk* is CP panels, after which running sums are brought to a common
// maximum; the *strip* keeps a block's unnormalised weights until its log-sum-exp is known, for sums over queries.
// Scores stay as the dot products are, or as masks and biases make them: a score times `unit` is in base 2. So equal
// scores stay equal, and large ones keep their digits.
#include "attention.h"
#include "vectors.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace REGARD_ISA {
namespace {

#if defined(__aarch64__) || defined(__arm__)
typedef __fp16 half;  // GCC before 13 knows _Float16 there in C alone
#else
typedef _Float16 half;
#endif

constexpr int BQ = 48, CP = PN >= 32 ? 8 : 128 / PN;
constexpr int FEW = 4;  // rows for which packing keys costs more than it saves
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float INF = std::numeric_limits<float>::infinity(), NOT = std::numeric_limits<float>::quiet_NaN();
constexpr float FLOOR = -1000.0f;  // a score this far below the maximum weighs nothing, and 0 * FLOOR is still 0
constexpr int64_t ALIGN = 64;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(ALIGN)); }
};
template <class T>
struct Memory {  // aligned, and not initialised
  std::unique_ptr<T, Free> own;
  int64_t size = 0;
  T* get(int64_t n) {
    if (n > size) {
      own.reset();
      own.reset(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(ALIGN))));
      size = n;
    }
    return own.get();
  }
};

// Denormals cost a hundred cycles each and weigh nothing.
struct FlushDenormals {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// --------------------------------------------------------------------------------------------- reading and writing

float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

int64_t at(const Tensor4& t, int64_t a, int64_t b, int64_t c) {
  return a * t.stride[0] + b * t.stride[1] + c * t.stride[2];
}

void read(const Tensor4& t, int64_t from, int64_t n, float* out) {
  const int64_t step = t.stride[3];
  switch (t.type) {
    case FLOAT32: {
      const float* p = static_cast<const float*>(t.data) + from;
      if (step == 1) memcpy(out, p, n * 4);
      else
        for (int64_t i = 0; i < n; i++) out[i] = p[i * step];
      break;
    }
    case BFLOAT16: {
      const uint16_t* p = static_cast<const uint16_t*>(t.data) + from;
      if (step == 1)
        for (int64_t i = 0; i < n; i++) out[i] = from_bfloat16(p[i]);
      else
        for (int64_t i = 0; i < n; i++) out[i] = from_bfloat16(p[i * step]);
      break;
    }
    case FLOAT16: {
      const half* p = static_cast<const half*>(t.data) + from;
      if (step == 1)
        for (int64_t i = 0; i < n; i++) out[i] = float(p[i]);
      else
        for (int64_t i = 0; i < n; i++) out[i] = float(p[i * step]);
      break;
    }
    default: {  // visible: 0, hidden: -inf
      const uint8_t* p = static_cast<const uint8_t*>(t.data) + from;
      if (step == 1)
        for (int64_t i = 0; i < n; i++) out[i] = p[i] ? 0.0f : -INF;
      else
        for (int64_t i = 0; i < n; i++) out[i] = p[i * step] ? 0.0f : -INF;
    }
  }
}

void write(const Tensor4& t, int64_t from, int64_t n, const float* in) {
  const int64_t step = t.stride[3];
  if (t.type == FLOAT32 && step == 1) {
    memcpy(static_cast<float*>(t.data) + from, in, n * 4);
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    if (t.type == FLOAT32) static_cast<float*>(t.data)[from + i * step] = in[i];
    else if (t.type == BFLOAT16) static_cast<uint16_t*>(t.data)[from + i * step] = to_bfloat16(in[i]);
    else static_cast<half*>(t.data)[from + i * step] = half(in[i]);
  }
}

// Rows a to a + n of one head, each [width], zeros after their end; `rows` of them, zeros too.
void read_rows(const Tensor4& t, int64_t batch, int64_t head, int64_t a, int64_t n, int64_t rows, int64_t dim,
               int64_t width, float* out) {
  for (int64_t i = 0; i < rows; i++) {
    if (i < n) read(t, at(t, batch, head, a + i), dim, out + i * width);
    std::fill(out + i * width + (i < n ? dim : 0), out + (i + 1) * width, 0.0f);
  }
}

// One panel: PN rows from `a`, turned to [dim up to whole vectors][PN]. rows: room for them as they are.
void read_panel(const Tensor4& t, int64_t batch, int64_t head, int64_t a, int64_t end, int64_t dim, float* rows,
                float* out) {
  const int64_t width = up(dim, W);
  read_rows(t, batch, head, a, std::min<int64_t>(PN, end - a), PN, dim, width, rows);
  for (int64_t d = 0; d < width; d += W)
    for (int j = 0; j < PN; j += W) turn(rows + j * width + d, width, out + d * PN + j, PN);
}

// ------------------------------------------------------------------------------------------------------- the tiles

// Scores of R rows and one panel. q: [dim][R], k: [dim][PN], s: rows PN apart. top, rows W apart: their maxima, or
// none.
template <int R>
void scores(const float* q, const float* k, int64_t dim, float* s, float* top) {
  vf a[R][2] = {};
#pragma GCC unroll 4
  for (int64_t d = 0; d < dim; d++) {
    const vf k0 = load(k + d * PN), k1 = load(k + d * PN + W);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const vf x = all(q[d * R + r]);
      a[r][0] += x * k0;
      a[r][1] += x * k1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    store(s + r * PN, a[r][0]);
    store(s + r * PN + W, a[r][1]);
    if (top) store(top + r * W, larger(load(top + r * W), larger(a[r][0], a[r][1])));
  }
}

// Scores of one row and one panel, from keys as they lie in memory. q: [width], k: PN rows `step` apart; see `scores`.
void scores_in_place(const float* q, const float* k, int64_t step, int64_t width, float* s, float* top) {
  for (int j = 0; j < PN; j += W, k += W * step) {
    vf a[W];
    for (int w = 0; w < W; w++) {  // in the order of memory
      a[w] = load(q) * load(k + w * step);
      for (int64_t d = W; d < width; d += W) a[w] += load(q + d) * load(k + w * step + d);
    }
    const vf found = sums(a);
    store(s + j, found);
    if (top) store(top, larger(load(top), found));
  }
}

// out[r][c] += sum over steps of p[r * RS + step * PS] * x[step * width + c], for R rows and C vectors of columns.
template <int R, int C, int RS, int PS>
void product(const float* const* ps, const float* const* xs, int parts, int64_t steps, int64_t width, float* out) {
  vf a[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) a[r][c] = load(out + r * width + c * W);
  for (int part = 0; part < parts; part++) {
    const float *p = ps[part], *x = xs[part];
#pragma GCC unroll 2
    for (int64_t step = 0; step < steps; step++) {
      vf y[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) y[c] = load(x + step * width + c * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const vf z = all(p[r * RS + step * PS]);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) a[r][c] += z * y[c];
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(out + r * width + c * W, a[r][c]);
}

template <int R, int RS, int PS>
void product_columns(const float* const* ps, const float* const* xs, int parts, int64_t steps, int64_t width,
                     float* out) {
  const float* shifted[CP];
  for (int64_t c = 0; c < width; c += MC * W) {
    for (int i = 0; i < parts; i++) shifted[i] = xs[i] + c;
    const int64_t left = (width - c) / W;
    if (left >= MC) product<R, MC, RS, PS>(ps, shifted, parts, steps, width, out + c);
    else if (left == 1) product<R, 1, RS, PS>(ps, shifted, parts, steps, width, out + c);
    else if (left == 2) product<R, 2, RS, PS>(ps, shifted, parts, steps, width, out + c);
    else product<R, 3, RS, PS>(ps, shifted, parts, steps, width, out + c);
  }
}

// The same for any number of rows. width: a multiple of W.
template <int RS, int PS>
void product_rows(int64_t rows, const float* const* ps, const float* const* xs, int parts, int64_t steps, int64_t width,
                  float* out) {
  const float* shifted[CP];
  for (int64_t r = 0; r < rows;) {
    for (int i = 0; i < parts; i++) shifted[i] = ps[i] + r * RS;
    float* o = out + r * width;
    const int64_t left = rows - r;
    if (left >= MX) product_columns<MX, RS, PS>(shifted, xs, parts, steps, width, o), r += MX;
    else if (left >= 4) product_columns<4, RS, PS>(shifted, xs, parts, steps, width, o), r += 4;
    else if (left >= 2) product_columns<2, RS, PS>(shifted, xs, parts, steps, width, o), r += 2;
    else product_columns<1, RS, PS>(shifted, xs, parts, steps, width, o), r += 1;
  }
}

void scores_of(int rows, const float* q, const float* k, int64_t dim, float* s, float* top) {
  if (rows == MR) scores<MR>(q, k, dim, s, top);
  else if (rows == MR / 2) scores<MR / 2>(q, k, dim, s, top);
  else if (rows == 2) scores<2>(q, k, dim, s, top);
  else scores<1>(q, k, dim, s, top);
}

// ------------------------------------------------------------------------------------------------- which pairs meet

// Rows of a block that go through the registers together.
struct Tile {
  int start, rows, real;          // rows: of the register tile; real: of them, those that are there
  int64_t low, high;              // keys that any row may see
  int64_t inner_low, inner_high;  // keys that every row sees, as far as limits say
  bool meets(int64_t panel) const { return panel * PN < high && (panel + 1) * PN > low; }
  bool within(int64_t panel) const { return panel * PN >= inner_low && (panel + 1) * PN <= inner_high; }
};

struct Tiles {
  int n = 0, padded = 0;
  Tile tile[BQ];
  const Tile* begin() const { return tile; }
  const Tile* end() const { return tile + n; }
};

struct Done {
  bool keys = false, values = false;
};

struct Panel {  // a type of ours, so that no other build's std::vector is linked in place of this one's
  int32_t number;
  operator int64_t() const { return number; }
};

struct Row {
  int64_t head, query;
  int64_t low, high;  // keys that the row may see: low <= key < high
};

struct Block {  // rows that are worked on together
  int64_t batch, kv_head;
  int m = 0;
  Row rows[BQ];
  std::vector<Panel> panels;  // that any row may see, ascending
  Tiles tiles;

  void limit(const Attention& a) {
    int64_t first = a.n_key, last = 0;
    tiles.n = tiles.padded = 0;
    while (tiles.padded < m) {
      const int left = m - tiles.padded;
      const int high = left > MR / 2 ? MR : left > 2 ? MR / 2 : left;
      Tile& tile = tiles.tile[tiles.n++] = {tiles.padded, high, std::min(left, high), a.n_key, 0, 0, a.n_key};
      for (int r = tile.start; r < tile.start + tile.real; r++) {
        Row& row = rows[r];
        const int64_t centre = row.query + a.offset;
        row.low = std::clamp<int64_t>(centre - a.left, 0, a.n_key);
        row.high = std::clamp<int64_t>(centre + a.right + 1, row.low, a.n_key);
        tile.low = std::min(tile.low, row.low), tile.high = std::max(tile.high, row.high);
        tile.inner_low = std::max(tile.inner_low, row.low), tile.inner_high = std::min(tile.inner_high, row.high);
      }
      first = std::min(first, tile.low), last = std::max(last, tile.high);
      tiles.padded += high;
    }
    panels.clear();
    if (!a.block_counts) {
      for (int64_t p = first / PN; p * PN < last; p++) panels.push_back({int32_t(p)});
      return;
    }
    const int64_t qb = rows[0].query / a.block_query, h = rows[0].head;
    const int32_t* index = a.block_indices + batch * a.index_stride[0] + h * a.index_stride[1] + qb * a.index_stride[2];
    const int64_t n = a.block_counts[batch * a.count_stride[0] + h * a.count_stride[1] + qb * a.count_stride[2]];
    for (int64_t i = 0; i < n; i++) {
      const int64_t from = index[i * a.index_stride[3]] * a.block_key;
      for (int64_t j = std::max(from, first / PN * PN); j < std::min(from + a.block_key, last); j += PN)
        panels.push_back({int32_t(j / PN)});
    }
    std::sort(panels.begin(), panels.end());
  }
};

float sink_of(const Attention& a, const Block& block, const Row& row) {
  return static_cast<const float*>(a.sinks.data)[at(a.sinks, block.batch, row.head, row.query)];
}

// Which rows go together: whole heads of one key head where queries are few, otherwise a stretch of one head's.
struct Plan {
  const Attention& a;
  int64_t group, heads_together, heads_units, parts, units, splits;
  Plan(const Attention& a, int64_t wanted) : a(a) {
    group = a.heads / a.kv_heads;
    heads_together = a.block_counts ? 1 : std::clamp<int64_t>(BQ / std::max<int64_t>(a.n_query, 1), 1, group);
    heads_units = (group + heads_together - 1) / heads_together;
    const int64_t base = a.batch * a.kv_heads * heads_units;
    const int64_t most = std::max<int64_t>(1, a.n_query / (4 * BQ));
    parts = std::clamp<int64_t>((wanted + base - 1) / base, 1, most);
    units = base * parts;
    // One query against a long cache: too few rows to share out, so keys are.
    const int64_t long_enough = std::max<int64_t>(1, a.n_key / 512);
    splits = units < wanted && a.n_query <= BQ ? std::clamp<int64_t>(wanted / units, 1, long_enough) : 1;
  }
  // With few queries, and one unit for each key head, each key is met once.
  bool panels_met_once() const { return heads_units * parts == 1 && a.n_query <= BQ && !a.block_counts; }
  struct Heads {
    int64_t batch, kv_head, first, last;
  };
  Heads heads_of(int64_t unit) const {
    const int64_t rest = unit / parts, kv_head = rest / heads_units % a.kv_heads;
    const int64_t first = kv_head * group + rest % heads_units * heads_together;
    return {rest / heads_units / a.kv_heads, kv_head, first, std::min(first + heads_together, (kv_head + 1) * group)};
  }
  // Calls f(block) for each block of a unit.
  template <class F>
  void blocks(int64_t unit, F&& f) const {
    Block block;
    const int64_t part = unit % parts;
    const auto [batch, kv_head, h0, h1] = heads_of(unit);
    block.batch = batch, block.kv_head = kv_head;
    const int64_t step = a.block_counts ? a.block_query : a.n_query;
    for (int64_t s = cut(part); s < cut(part + 1);) {
      const int64_t stop = a.block_counts ? std::min((s / step + 1) * step, cut(part + 1)) : cut(part + 1);
      // Stretches of equal length, so that none is left with a few rows
      const int64_t pieces = (stop - s + BQ - 1) / BQ;
      const int64_t rows = a.block_counts ? std::min<int64_t>(BQ, up((stop - s + pieces - 1) / pieces, MR)) : BQ;
      const int64_t e = std::min(stop, s + rows);
      block.m = 0;
      for (int64_t h = h0; h < h1; h++)
        for (int64_t i = s; i < e; i++) block.rows[block.m++] = {h, i, 0, 0};
      block.limit(a);
      f(block);
      s = e;
    }
  }
  int64_t cut(int64_t part) const {  // causal: later queries see more keys
    if (part == 0 || part == parts) return part ? a.n_query : 0;
    const double f = double(part) / parts;
    const bool grows = a.right < a.n_key && a.left >= a.n_key;
    const int64_t i = int64_t((grows ? std::sqrt(f) : f) * a.n_query);
    return a.block_counts ? i / a.block_query * a.block_query : i;
  }
};

// Keys and values of one head, packed panel by panel as they are first met. Each thread has its own: what it packs it
// uses at once, and again and again.
class Packed {
  const Attention& a;
  bool once;    // no panel is met twice: room for a chunk of them will do
  bool turned;  // values are wanted as panels, and keys as rows: for gradients
  int64_t batch = -1, kv_head = -1, panels;
  Memory<float> keys, values, key_rows, scratch;
  std::vector<Done> done;

  float* place(Memory<float>& memory, int64_t p, int slot, int64_t width) const {
    return memory.get((once ? CP : panels) * PN * width) + (once ? slot : p) * PN * width;
  }
  // Panel p as it lies in memory, rows `width` apart, where it can be used like that.
  const float* as_it_is(const Tensor4& t, int64_t dim, int64_t p) const {
    const bool fits = t.type == FLOAT32 && t.stride[3] == 1 && dim % W == 0 && (p + 1) * PN <= a.n_key;
    return fits ? static_cast<const float*>(t.data) + at(t, batch, kv_head, p * PN) : nullptr;
  }

 public:
  const int64_t width, value_width;
  Packed(const Attention& a, bool once, bool turned)
      : a(a),
        once(once),
        turned(turned),
        panels((a.n_key + PN - 1) / PN),
        width(up(a.dim, W)),
        value_width(up(a.value_dim, W)) {
    if (!once) done.resize(panels);
  }
  void turn_to(int64_t new_batch, int64_t new_head) {
    if (batch == new_batch && kv_head == new_head) return;
    batch = new_batch, kv_head = new_head;
    std::fill(done.begin(), done.end(), Done{});
  }
  // Panel p of the head, as number `slot` of its chunk: keys [width][PN], values [PN][value_width].
  const float* key_panel(int64_t p, int slot) {
    float* out = place(keys, p, slot, width);
    if (!once && done[p].keys) return out;
    float* rows = turned ? place(key_rows, p, slot, width) : scratch.get(PN * std::max(width, value_width));
    read_panel(a.key, batch, kv_head, p * PN, a.n_key, a.dim, rows, out);
    if (!once) done[p].keys = true;
    return out;
  }
  const float* rows_of_keys(int64_t p) { return place(key_rows, p, 0, width); }
  // The keys of panel p as rows, `step` apart, each whole vectors wide.
  const float* keys_in_place(int64_t p, int64_t* step) {
    *step = a.key.stride[2];
    if (const float* own = as_it_is(a.key, a.dim, p)) return own;
    float* rows = scratch.get(PN * std::max(width, value_width));
    read_rows(a.key, batch, kv_head, p * PN, std::min<int64_t>(PN, a.n_key - p * PN), PN, a.dim, *step = width, rows);
    return rows;
  }
  const float* value_panel(int64_t p, int slot) {
    if (const float* own = as_it_is(a.value, a.value_dim, p); own && once && a.value.stride[2] == value_width) return own;
    float* out = place(values, p, slot, value_width);
    if (!once && done[p].values) return out;
    const int64_t n = std::min<int64_t>(PN, a.n_key - p * PN);
    float* rows = scratch.get(PN * std::max(width, value_width));
    if (turned) read_panel(a.value, batch, kv_head, p * PN, a.n_key, a.value_dim, rows, out);
    else read_rows(a.value, batch, kv_head, p * PN, n, PN, a.value_dim, value_width, out);
    if (!once) done[p].values = true;
    return out;
  }
};

// Runs work(thread's own things, unit) for every unit, on the threads of the call. make(): those things.
template <class Make, class F>
void share(int64_t units, int64_t threads, Make&& make, F&& f) {
  std::atomic<int64_t> next{0};
  parallel(std::min(units, threads), threads, [&](int64_t) {
    const FlushDenormals flush;
    auto own = make();
    for (int64_t unit; (unit = next++) < units;) f(*own, unit);
  });
}

// A block's queries as rows [row][width], and turned for the tiles, [dim][tile rows] each.
void read_queries(const Tensor4& from, const Block& block, int64_t dim, int64_t width, float* rows, float* out) {
  for (int i = 0; i < block.tiles.padded; i++) {
    float* x = rows + i * width;
    if (i < block.m) read(from, at(from, block.batch, block.rows[i].head, block.rows[i].query), dim, x);
    std::fill(x + (i < block.m ? dim : 0), x + width, 0.0f);
  }
  if (!out) return;
  for (const Tile& t : block.tiles)
    for (int64_t d = 0; d < dim; d++)
      for (int r = 0; r < t.rows; r++) out[t.start * dim + d * t.rows + r] = rows[(t.start + r) * width + d];
}

// ------------------------------------------------------------------------------------------------------ the scores

// What of a panel's scores a mask, a bias, a softcap or a limit changes.
struct Dress {
  const Attention& a;
  bool changed;
  vf lanes;
  float unit;  // base-2 logarithm of the weight of a score of 1
  explicit Dress(const Attention& a)
      : a(a),
        changed(a.mask.data || a.bias.data || a.softcap != 0.0 || !(a.scale > 0.0)),
        unit(changed ? LOG2E : float(a.scale * 1.4426950408889634)) {
    for (int w = 0; w < W; w++) lanes[w] = float(w);
  }
  bool needed(const Tile& tile, int64_t panel) const { return changed || !tile.within(panel); }

  // In place, for the rows of one tile. slope, laid out as s: the softcap's derivative, or none.
  void operator()(const Block& block, const Tile& tile, int64_t panel, float* s, float* slope, float* top) const {
    const int64_t j0 = panel * PN;
    for (int r = tile.start; r < tile.start + tile.real; r++) {
      const Row& row = block.rows[r];
      float* x = s + r * PN;
      if (changed) change(block, row, j0, x, slope ? slope + r * PN : nullptr);
      const vf low = all(float(std::clamp<int64_t>(row.low - j0, 0, PN)));
      const vf high = all(float(std::clamp<int64_t>(row.high - j0, 0, PN)));
      const vf x0 = pick((lanes >= low) & (lanes < high), load(x), all(-INF)), next = lanes + all(float(W));
      const vf x1 = pick((next >= low) & (next < high), load(x + W), all(-INF));
      store(x, x0), store(x + W, x1);
      if (top) store(top + r * W, larger(load(top + r * W), larger(x0, x1)));
    }
  }

  void change(const Block& block, const Row& row, int64_t j0, float* x, float* slope) const {
    const int64_t n = std::min<int64_t>(PN, a.n_key - j0);
    float extra[PN] = {}, biased[PN] = {};
    if (a.mask.data) read(a.mask, at(a.mask, block.batch, row.head, row.query) + j0 * a.mask.stride[3], n, extra);
    if (a.bias.data) read(a.bias, at(a.bias, block.batch, row.head, row.query) + j0 * a.bias.stride[3], n, biased);
    const bool boolean = a.mask.data && a.mask.type == BOOLEAN;
    for (int v = 0; v < PN; v += W) {
      vf y = load(x + v) * all(float(a.scale));
      if (a.softcap != 0.0) {
        const vf t = tanh(y * all(float(1.0 / a.softcap)));
        y = t * all(float(a.softcap));
        if (slope) store(slope + v, all(1.0f) - t * t);
      }
      const vf m = load(extra + v);
      y += load(biased + v);
      y = boolean ? pick(m == all(-INF), all(float(a.hidden)), y) : y + m;  // a hidden NaN stays hidden
      store(x + v, y);
    }
  }
};

// Of panels [t, t + n) of a block's list, which a tile meets: from, to, counted from t. They are neighbours.
void meeting(const Block& block, const Tile& tile, int64_t t, int n, int* from, int* to) {
  *from = 0, *to = n;
  while (*from < *to && !tile.meets(block.panels[t + *from])) ++*from;
  while (*to > *from && !tile.meets(block.panels[t + *to - 1])) --*to;
}

// ------------------------------------------------------------------------------------------------------ forward

// What is known of a block's rows after some of its panels. Sums are of 2^(score - maximum), one lane for each W-th
// key.
struct State {
  Memory<float> memory, strip_memory, maxima_memory;
  float *maximum, *sum, *entropy, *squares, *distance, *mass, *output, *strip, *maxima;
  int64_t slots = 0;  // panels in the strip
  int64_t rows = 0;
};

struct Forward {
  const Attention& a;
  const Results& r;
  Packed packed;
  Dress dress;
  bool keep;  // the strip
  int64_t width, part = 0, parts;
  float* columns;  // what keys received from each part of the queries: [part][n_received][batch][head][columns_width]
  int64_t columns_width;
  Memory<float> queries;
  State state;

  Forward(const Attention& a, const Results& r, const Plan& plan, float* columns, int64_t columns_width)
      : a(a),
        r(r),
        packed(a, plan.panels_met_once(), false),
        dress(a),
        keep((r.n_received && !r.given_lse) || r.k || r.n_at),
        width(packed.value_width),
        parts(plan.parts),
        columns(columns),
        columns_width(columns_width) {}

  void start(State& s, const Block& block, int64_t unit, int64_t slots) {
    packed.turn_to(block.batch, block.kv_head);
    part = unit % parts;
    s.rows = block.tiles.padded;
    const int64_t lanes = s.rows * W;
    float* p = s.memory.get(s.rows + lanes * (3 + r.n_distance + r.n_mass) + s.rows * width);
    const auto take = [&](int64_t n) { return (p += n) - n; };
    s.sum = take(lanes), s.entropy = take(lanes), s.squares = take(lanes);
    s.distance = take(lanes * r.n_distance), s.mass = take(lanes * r.n_mass);
    s.output = take(s.rows * width), s.maximum = take(s.rows);
    std::fill(s.sum, s.maximum, 0.0f);
    std::fill(s.maximum, s.maximum + s.rows, -INF);
    s.slots = slots;
    s.strip = s.strip_memory.get((keep ? slots + CP : CP) * block.tiles.padded * PN);
    s.maxima = s.maxima_memory.get((slots / CP + 1) * s.rows);
  }

  // A block's queries: turned for the tiles, or as rows where they are few.
  const float* read_block(const Block& block) {
    const int64_t rows = block.tiles.padded;
    float* q = queries.get(rows * (a.dim + packed.width));
    read_queries(a.query, block, a.dim, packed.width, q + rows * a.dim, q);
    return block.m <= FEW ? q + rows * a.dim : q;
  }

  // Scores of one tile and one panel, before a mask or anything else changes them.
  void score(const Block& block, const Tile& tile, const float* q, int64_t panel, int slot, float* s, float* top) {
    if (block.m > FEW) {
      scores_of(tile.rows, q + tile.start * a.dim, packed.key_panel(panel, slot), a.dim, s, top);
      return;
    }
    int64_t step;
    const float* k = packed.keys_in_place(panel, &step);
    for (int i = 0; i < tile.real; i++)
      scores_in_place(q + (tile.start + i) * packed.width, k, step, packed.width, s + i * PN, top ? top + i * W : top);
  }

  // Panels [first, last) of the block's list.
  void accumulate(const Block& block, State& s, int64_t first, int64_t last) {
    const int64_t slot_size = int64_t(block.tiles.padded) * PN;
    const float* q = read_block(block);
    alignas(64) float top[BQ * W];
    for (int64_t t = first; t < last; t += CP) {
      const int n = int(std::min<int64_t>(CP, last - t));
      float* strip = s.strip + (keep ? (t - first) * slot_size : 0);
      const float *weights[CP], *values[CP];
      std::fill(top, top + block.tiles.padded * W, -INF);
      for (int u = 0; u < n; u++) {
        const int64_t p = block.panels[t + u];
        float* x = strip + u * slot_size;
        for (const Tile& tile : block.tiles) {
          float* tile_top = top + tile.start * W;
          if (!tile.meets(p)) {
            std::fill_n(x + tile.start * PN, tile.rows * PN, 0.0f);
          } else if (dress.needed(tile, p)) {
            score(block, tile, q, p, u, x + tile.start * PN, nullptr);
            dress(block, tile, p, x, nullptr, top);
          } else {
            score(block, tile, q, p, u, x + tile.start * PN, tile_top);
          }
        }
        weights[u] = x;
        if (r.output.data) values[u] = packed.value_panel(p, u);
      }
      float* maxima = s.maxima + (t - first) / CP * s.rows;
      for (const Tile& tile : block.tiles) {
        int from, to;
        meeting(block, tile, t, n, &from, &to);
        for (int i = tile.start; i < tile.start + tile.real; i++) {
          const float peak = largest(load(top + i * W));
          if (r.given_lse) {
            const Row& row = block.rows[i];
            const float lse =
                r.given_lse[(block.batch * a.heads + row.head) * a.n_query + row.query] * (LOG2E / dress.unit);
            s.maximum[i] = std::max(s.maximum[i], peak);
            maxima[i] = lse > -INF ? lse : 0.0f;
          } else {
            raise(s, i, peak);
            maxima[i] = s.maximum[i] > -INF ? s.maximum[i] : 0.0f;
          }
          exponentials(s, i, maxima[i], strip + i * PN + from * slot_size, to - from, slot_size);
          for (int64_t c = 0; c < r.n_distance; c++) distances(block, s, c, i, t, strip + i * PN, from, to, slot_size);
        }
        if (!r.output.data) continue;
        const float* p[CP];
        for (int u = from; u < to; u++) p[u] = weights[u] + tile.start * PN;
        product_rows<PN, 1>(tile.real, p + from, values + from, to - from, PN, width, s.output + tile.start * width);
      }
      for (int64_t g = 0; g < r.n_mass; g++) masses(block, s, g, t, strip, n, slot_size);
      if (r.given_lse && r.n_received) {
        alignas(64) float ones[BQ];
        std::fill(ones, ones + BQ, 1.0f);
        receive(block, t, n, strip, slot_size, ones);
      }
    }
  }

  // A row's sums follow its maximum when that rises.
  void raise(State& s, int i, float top) const {
    const float before = s.maximum[i];
    if (!(top > before)) return;
    s.maximum[i] = top;
    if (before == -INF) return;  // everything is 0 still
    const float down = std::max((before - top) * dress.unit, FLOOR);
    const vf factor = all(weight_at(down));
    const auto scale = [&](float* p) { store(p, load(p) * factor); };
    if (r.entropy) store(s.entropy + i * W, (load(s.entropy + i * W) + load(s.sum + i * W) * all(down)) * factor);
    scale(s.sum + i * W);
    if (r.squares) store(s.squares + i * W, load(s.squares + i * W) * factor * factor);
    for (int64_t c = 0; c < r.n_distance; c++) scale(s.distance + (c * s.rows + i) * W);
    for (int64_t g = 0; g < r.n_mass; g++) scale(s.mass + (g * s.rows + i) * W);
    if (r.output.data)
      for (int64_t d = 0; d < width; d += W) scale(s.output + i * width + d);
  }

  void exponentials(State& s, int i, float shift, float* x, int n, int64_t slot_size) const {
    const vf by = all(shift), floor = all(FLOOR), unit = all(dress.unit);
    vf total = load(s.sum + i * W), entropy = load(s.entropy + i * W);
    for (int u = 0; u < n; u++, x += slot_size) {
      const vf s0 = larger(floor, (load(x) - by) * unit), s1 = larger(floor, (load(x + W) - by) * unit);
      const vf p0 = exp2(s0), p1 = exp2(s1);
      store(x, p0), store(x + W, p1);
      total += p0 + p1;
      entropy += p0 * s0;
      entropy += p1 * s1;
    }
    store(s.sum + i * W, total), store(s.entropy + i * W, entropy);
    if (!r.squares) return;
    vf squares = load(s.squares + i * W);
    x -= n * slot_size;
    for (int u = 0; u < n; u++, x += slot_size) {
      const vf p0 = load(x), p1 = load(x + W);
      squares += p0 * p0;
      squares += p1 * p1;
    }
    store(s.squares + i * W, squares);
  }

  void distances(const Block& block, State& s, int64_t c, int i, int64_t t, const float* x, int from, int to,
                 int64_t slot_size) const {
    vf lanes;
    for (int w = 0; w < W; w++) lanes[w] = float(w);
    const vf clip = all(r.clips[c] < 0 ? INF : r.clips[c]);
    vf d = load(s.distance + (c * s.rows + i) * W);
    for (int u = from; u < to; u++) {
      const float* p = x + u * slot_size;
      const vf near = all(float(r.start + block.rows[i].query - block.panels[t + u] * PN)) - lanes;
      const vf far = near - all(float(W));
      const vf d0 = larger(near, -near), d1 = larger(far, -far);
      d += load(p) * (d0 < clip ? d0 : clip);
      d += load(p + W) * (d1 < clip ? d1 : clip);
    }
    store(s.distance + (c * s.rows + i) * W, d);
  }

  void masses(const Block& block, State& s, int64_t g, int64_t t, const float* x, int n, int64_t slot_size) const {
    alignas(64) float set[PN];
    for (int u = 0; u < n; u++, x += slot_size) {
      const int64_t j0 = block.panels[t + u] * PN;
      for (int j = 0; j < PN; j++)
        set[j] = j0 + j < a.n_key ? r.sets[block.batch * r.mass_stride + g * a.n_key + j0 + j] : 0.0f;
      const vf g0 = load(set), g1 = load(set + W);
      for (int i = 0; i < block.m; i++) {
        float* m = s.mass + (g * s.rows + i) * W;
        store(m, load(m) + load(x + i * PN) * g0 + load(x + i * PN + W) * g1);
      }
    }
  }

  // Adds factor[i] * weights to what keys received.
  void receive(const Block& block, int64_t t, int n, const float* x, int64_t slot_size, const float* factor) const {
    for (int64_t g = 0; g < r.n_received; g++) {
      alignas(64) float w[BQ];
      for (int i = 0; i < block.m; i++) w[i] = factor[i] * group_of(block, i, g);
      for (int i0 = 0, i1; i0 < block.m; i0 = i1) {
        for (i1 = i0; i1 < block.m && block.rows[i1].head == block.rows[i0].head; i1++) {
        }
        bool any = false;
        for (int i = i0; i < i1; i++) any |= w[i] != 0.0f;
        if (!any) continue;
        float* columns = columns_of(block, block.rows[i0].head, g);
        for (int u = 0; u < n; u++) {
          const float* p = x + u * slot_size;
          const int64_t j0 = block.panels[t + u] * PN;
          vf c0 = load(columns + j0), c1 = load(columns + j0 + W);
#pragma GCC unroll 4
          for (int i = i0; i < i1; i++) {
            const vf f = all(w[i]);
            c0 += f * load(p + i * PN);
            c1 += f * load(p + i * PN + W);
          }
          store(columns + j0, c0), store(columns + j0 + W, c1);
        }
      }
    }
  }
  float group_of(const Block& block, int i, int64_t g) const {
    return r.groups ? r.groups[block.batch * r.received_stride + g * a.n_query + block.rows[i].query] : 1.0f;
  }
  float* columns_of(const Block& block, int64_t head, int64_t g) const {
    return columns + (((part * r.n_received + g) * a.batch + block.batch) * a.heads + head) * columns_width;
  }

  // Rows are complete: normalise and write. Splits of the keys, if several, are joined first.
  void finish(const Block& block, State* states, const int64_t* firsts, int splits) const {
    const int64_t slot_size = int64_t(block.tiles.padded) * PN;
    State& s = states[0];
    // A weight is 2^((score - reference) * unit - above). Kept apart: a reference of -2e38 would swallow what is above
    // it.
    alignas(64) float references[BQ], aboves[BQ];
    bool bad = false;
    for (int i = 0; i < block.m; i++) {
      const Row& row = block.rows[i];
      float peak_score = s.maximum[i];
      for (int k = 1; k < splits; k++) peak_score = std::max(peak_score, states[k].maximum[i]);
      for (int k = 0; k < splits && !r.given_lse; k++) raise(states[k], i, peak_score);
      const auto total = [&](float* State::* field, int64_t from) {
        vf x = load(s.*field + from);
        for (int k = 1; k < splits; k++) x += load(states[k].*field + from);
        return sum(x);
      };
      const int64_t out = (block.batch * a.heads + row.head) * a.n_query + row.query;
      const float mine = total(&State::sum, i * W);
      const float reference = r.given_lse ? s.maxima[i] : s.maximum[i];
      float above = std::log2(mine), inverse = 1.0f / mine;
      float level = reference, over = above;  // the same as reference and above, from the sink where it is higher
      if (r.given_lse) {
        if (a.sinks.data) above = over = 0.0f, inverse = 1.0f;  // otherwise the total takes its rounding away
      } else if (a.sinks.data) {
        const float sink = sink_of(a, block, row) * (LOG2E / dress.unit), peak = std::max(sink, s.maximum[i]);
        const float own = weight_at((s.maximum[i] - peak) * dress.unit);
        const float all_weight = mine * own + weight_at((sink - peak) * dress.unit);
        level = peak, over = std::log2(all_weight);
        above = (peak - s.maximum[i]) * dress.unit + over;
        inverse = own / all_weight;
        if (sink != sink) inverse = above = NOT;
      }
      bool blind = mine == 0.0f;
      if (blind) inverse = above = a.sinks.data || hidden_by_mask(block, row) ? 0.0f : NOT;
      if (mine != mine) inverse = above = NOT;
      bad |= inverse != inverse;
      const float zero = blind ? inverse : 0.0f;  // 0, or NaN
      references[i] = blind ? 0.0f : level;
      aboves[i] = blind && inverse == 0.0f ? INF : inverse != inverse ? NOT : over;
      if (r.lse)
        r.lse[out] = !blind            ? level * (dress.unit * LN2) + aboves[i] * LN2
                     : a.sinks.data    ? sink_of(a, block, row)
                     : inverse == 0.0f ? -INF
                                       : NOT;
      if (r.above) r.reference[out] = references[i], r.above[out] = aboves[i];
      if (r.entropy)
        r.entropy[out] =
            blind || inverse == 0.0f ? zero : LN2 * inverse * (above * mine - total(&State::entropy, i * W));
      if (r.maximum) r.maximum[out] = blind ? zero : weight_at((peak_score - reference) * dress.unit) * inverse;
      if (r.squares) r.squares[out] = total(&State::squares, i * W) * inverse * inverse;
      const int64_t rows = a.batch * a.heads * a.n_query;
      for (int64_t c = 0; c < r.n_distance; c++)
        r.distance[c * rows + out] = total(&State::distance, (c * s.rows + i) * W) * inverse;
      for (int64_t g = 0; g < r.n_mass; g++) r.mass[g * rows + out] = total(&State::mass, (g * s.rows + i) * W) * inverse;
      if (r.output.data) {
        float* o = s.output + i * width;
        for (int64_t d = 0; d < width; d += W) {
          vf x = load(o + d);
          for (int k = 1; k < splits; k++) x += load(states[k].output + i * width + d);
          store(o + d, x * all(inverse));
        }
        write(r.output, at(r.output, block.batch, row.head, row.query), a.value_dim, o);
      }
    }
    if (!keep) return;
    for (int k = 0; k < splits; k++) {
      const State& own = states[k];
      alignas(64) float factor[BQ];
      for (int64_t t = 0; t < own.slots; t += CP) {
        const int n = int(std::min<int64_t>(CP, own.slots - t));
        for (int i = 0; i < block.m; i++)
          factor[i] = weight_at((own.maxima[t / CP * own.rows + i] - references[i]) * dress.unit - aboves[i]);
        float* strip = own.strip + t * slot_size;
        if (r.n_received && !r.given_lse) receive(block, firsts[k] + t, n, strip, slot_size, factor);
        if (r.k || r.n_at)  // looked at again, each row by itself
          for (int u = 0; u < n; u++)
            for (int i = 0; i < block.m; i++) {
              float* x = strip + u * slot_size + i * PN;
              const vf f = all(factor[i]);
              store(x, load(x) * f), store(x + W, load(x + W) * f);
            }
      }
    }
    for (int i = 0; i < block.m && bad; i++)  // a row of NaN has no key that is not
      for (int64_t g = 0; g < r.n_received; g++)
        if (aboves[i] != aboves[i] && group_of(block, i, g) != 0.0f)
          std::fill_n(columns_of(block, block.rows[i].head, g), columns_width, NOT);
    for (int i = 0; i < block.m && r.k; i++) top(block, i, states, firsts, splits, slot_size, aboves[i] != aboves[i]);
    for (int i = 0; i < block.m && r.n_at; i++) look_up(block, i, states, firsts, splits, slot_size);
  }

  // Whether a row without weight was hidden whole, rather than scored -inf.
  bool hidden_by_mask(const Block& block, const Row& row) const {
    if (row.low >= row.high || block.panels.empty()) return true;
    if (a.mask.type != BOOLEAN || !a.mask.data)
      return a.block_counts != nullptr && !a.mask.data && sees_none(block, row);
    float extra;
    for (const int64_t p : block.panels)  // what a mask shows of keys that are not listed is not seen
      for (int64_t j = std::max(row.low, p * PN); j < std::min(row.high, (p + 1) * PN); j++) {
        read(a.mask, at(a.mask, block.batch, row.head, row.query) + j * a.mask.stride[3], 1, &extra);
        if (extra == 0.0f) return false;
      }
    return true;
  }
  bool sees_none(const Block& block, const Row& row) const {
    for (const int64_t p : block.panels)
      if (p * PN < row.high && (p + 1) * PN > row.low) return false;
    return true;
  }

  void top(const Block& block, int i, State* states, const int64_t* firsts, int splits, int64_t slot_size,
           bool bad) const {
    const Row& row = block.rows[i];
    const int64_t out = ((block.batch * a.heads + row.head) * a.n_query + row.query) * r.k;
    float* best = r.top + out;
    int64_t* where = r.top_at + out;
    std::fill(best, best + r.k, bad ? NOT : 0.0f), std::fill(where, where + r.k, int64_t(-1));
    for (int k = 0; k < splits && !bad; k++)
      for (int64_t t = 0; t < states[k].slots; t++) {
        const float* x = states[k].strip + t * slot_size + i * PN;
        const float low = best[r.k - 1];
        const float high = largest(larger(load(x), load(x + W)));
        if (!(high > low)) continue;
        for (int j = 0; j < PN; j++) {
          if (!(x[j] > best[r.k - 1])) continue;
          int64_t b = r.k - 1;
          for (; b > 0 && x[j] > best[b - 1]; b--) best[b] = best[b - 1], where[b] = where[b - 1];
          best[b] = x[j], where[b] = block.panels[firsts[k] + t] * PN + j;
        }
      }
  }

  void look_up(const Block& block, int i, State* states, const int64_t* firsts, int splits, int64_t slot_size) const {
    const Row& row = block.rows[i];
    const int64_t rows = a.batch * a.heads * a.n_query;
    const int64_t out = (block.batch * a.heads + row.head) * a.n_query + row.query;
    for (int64_t n = 0; n < r.n_at; n++) {
      const int64_t j = r.at[block.batch * r.at_stride + n * a.n_query + row.query];
      float weight = 0.0f;
      if (j >= row.low && j < row.high) {
        const auto& all_panels = block.panels;
        const auto found = std::lower_bound(all_panels.begin(), all_panels.end(), Panel{int32_t(j / PN)});
        if (found != all_panels.end() && *found == j / PN) {
          const int64_t t = found - all_panels.begin();
          int k = splits - 1;
          while (firsts[k] > t) k--;
          weight = states[k].strip[(t - firsts[k]) * slot_size + i * PN + j % PN];
        }
      }
      r.at_weight[n * rows + out] = weight;
    }
  }
};

}  // namespace

void forward(const Attention& a, const Results& r) {
  const Plan plan(a, a.threads > 1 ? 4 * a.threads : 1);
  const int64_t columns_width = up(a.n_key, PN), columns_size = r.n_received * a.batch * a.heads * columns_width;
  Memory<float> columns;
  if (r.n_received) std::fill_n(columns.get(plan.parts * columns_size), plan.parts * columns_size, 0.0f);
  const auto make = [&] { return std::make_unique<Forward>(a, r, plan, columns.own.get(), columns_width); };
  // What a head's keys received, parts of the queries added up always in the same order.
  const auto give = [&](int64_t i) {
    for (int64_t j = 0; j < a.n_key; j++) {
      float total = 0.0f;
      for (int64_t part = 0; part < plan.parts; part++)
        total += columns.own.get()[part * columns_size + i * columns_width + j];
      r.received[i * a.n_key + j] = total;
    }
  };
  const auto end = [&](int64_t unit) {  // a head is one unit's own, unless its queries are in parts
    const auto of = plan.heads_of(unit);
    for (int64_t g = 0; g < r.n_received && plan.parts == 1; g++)
      for (int64_t h = of.first; h < of.last; h++) give((g * a.batch + of.batch) * a.heads + h);
  };

  if (plan.splits == 1) {
    share(plan.units, a.threads, make, [&](Forward& own, int64_t unit) {
      const int64_t first = 0;
      plan.blocks(unit, [&](const Block& block) {
        own.start(own.state, block, unit, block.panels.size());
        own.accumulate(block, own.state, 0, block.panels.size());
        own.finish(block, &own.state, &first, 1);
      });
      end(unit);
    });
  } else {
    std::vector<State> states(plan.units * plan.splits);
    const auto from = [&](const Block& block, int64_t split) {
      const int64_t panels = block.panels.size();
      return std::min<int64_t>(panels, (panels + plan.splits - 1) / plan.splits * split);
    };
    share(plan.units * plan.splits, a.threads, make, [&](Forward& own, int64_t i) {
      const int64_t split = i % plan.splits;
      plan.blocks(i / plan.splits, [&](const Block& block) {
        own.start(states[i], block, i / plan.splits, from(block, split + 1) - from(block, split));
        own.accumulate(block, states[i], from(block, split), from(block, split + 1));
      });
    });
    share(plan.units, a.threads, make, [&](Forward& own, int64_t unit) {
      Memory<int64_t> firsts_memory;
      int64_t* firsts = firsts_memory.get(plan.splits);
      plan.blocks(unit, [&](const Block& block) {
        for (int64_t split = 0; split < plan.splits; split++) firsts[split] = from(block, split);
        own.finish(block, &states[unit * plan.splits], firsts, int(plan.splits));
      });
      end(unit);
    });
  }
  if (plan.parts > 1) parallel(r.n_received * a.batch * a.heads, a.threads, [&](int64_t i) { give(i); });
}

// ------------------------------------------------------------------------------------------------------ backward

namespace {

// What one thread works with in the backward pass: of one unit, whose heads' gradients of keys and values add up here.
struct Backward {
  const Attention& a;
  const Gradients& g;
  Packed packed;
  Dress dress;
  bool capped;
  int64_t width, value_width, padded_keys, head_size;
  Memory<float> memory, sums_memory;
  float *q_rows, *q, *d_rows, *d, *o_rows, *d_query, *weights, *d_weights, *slope, *reference, *above, *inner, *sums;

  Backward(const Attention& a, const Gradients& g, const Plan& plan)
      : a(a),
        g(g),
        packed(a, false, true),
        dress(a),
        capped(a.softcap != 0.0),
        width(packed.width),
        value_width(packed.value_width),
        padded_keys(up(a.n_key, PN)),
        head_size(padded_keys * (width + value_width)) {
    const int64_t area = BQ * CP * PN;
    float* p = memory.get(BQ * 3 * (width + value_width) + 3 * area + 3 * BQ);
    const auto take = [&](int64_t n) { return (p += n) - n; };
    q_rows = take(BQ * width), q = take(BQ * width), d_query = take(BQ * width);
    d_rows = take(BQ * value_width), d = take(BQ * value_width), o_rows = take(BQ * value_width);
    weights = take(area), d_weights = take(area), slope = take(area);
    reference = take(BQ), above = take(BQ), inner = take(BQ);
    sums = sums_memory.get(plan.heads_together * head_size);
  }

  // first_head: of the unit
  void block(const Block& block, int64_t first_head) {
    packed.turn_to(block.batch, block.kv_head);
    read_queries(a.query, block, a.dim, width, q_rows, q);
    read_queries(g.grad, block, a.value_dim, value_width, d_rows, d);
    read_queries(g.output, block, a.value_dim, value_width, o_rows, nullptr);
    std::fill(d_query, d_query + BQ * width, 0.0f);
    for (int i = 0; i < block.m; i++) row(block, i);
    const int64_t slot = int64_t(block.tiles.padded) * PN;
    for (size_t t = 0; t < block.panels.size(); t += CP) {
      const int n = int(std::min<size_t>(CP, block.panels.size() - t));
      const float *d_scores[CP], *keys[CP];
      for (int u = 0; u < n; u++) {
        const int64_t p = block.panels[t + u];
        float *x = weights + u * slot, *dx = d_weights + u * slot;
        for (const Tile& tile : block.tiles) this->tile(block, tile, p, u, x, dx);
        d_scores[u] = dx, keys[u] = packed.rows_of_keys(p);
        for (int i0 = 0, i1; i0 < block.m; i0 = i1) {
          for (i1 = i0; i1 < block.m && block.rows[i1].head == block.rows[i0].head; i1++) {
          }
          float* own = sums + (block.rows[i0].head - first_head) * head_size;
          const float *xs = x + i0 * PN, *dxs = dx + i0 * PN, *qs = q_rows + i0 * width,
                      *ds = d_rows + i0 * value_width;
          product_rows<1, PN>(PN, &dxs, &qs, 1, i1 - i0, width, own + p * PN * width);
          product_rows<1, PN>(PN, &xs, &ds, 1, i1 - i0, value_width, own + padded_keys * width + p * PN * value_width);
        }
      }
      for (const Tile& tile : block.tiles) {
        int from, to;
        meeting(block, tile, t, n, &from, &to);
        const float* p[CP];
        for (int u = from; u < to; u++) p[u] = d_scores[u] + tile.start * PN;
        product_rows<PN, 1>(tile.real, p + from, keys + from, to - from, PN, width, d_query + tile.start * width);
      }
    }
    for (int i = 0; i < block.m; i++) {
      float* out = g.query + row_of(block, i) * a.dim;
      for (int64_t c = 0; c < a.dim; c++) out[c] = d_query[i * width + c] * float(a.scale);
    }
  }

  int64_t row_of(const Block& block, int i) const {
    return (block.batch * a.heads + block.rows[i].head) * a.n_query + block.rows[i].query;
  }

  void row(const Block& block, int i) {
    vf total = {};
    for (int64_t c = i * value_width; c < (i + 1) * value_width; c += W) total += load(d_rows + c) * load(o_rows + c);
    inner[i] = sum(total);
    const int64_t at = row_of(block, i);
    const bool blind = g.lse && g.lse[at] == -INF;
    reference[i] = g.lse ? (blind ? 0.0f : g.lse[at] * (LOG2E / dress.unit)) : g.reference[at];
    above[i] = g.lse ? (blind ? INF : 0.0f) : g.above[at];
    if (!g.sinks) return;
    const float sink = sink_of(a, block, block.rows[i]) * (LOG2E / dress.unit);
    g.sinks[at] = -weight_at((sink - reference[i]) * dress.unit - above[i]) * inner[i];
  }

  // Weights x and the gradient of scores dx, for the rows of a tile and one panel.
  void tile(const Block& block, const Tile& tile, int64_t panel, int slot, float* x, float* dx) {
    const float *k = packed.key_panel(panel, slot), *v = packed.value_panel(panel, slot);
    const int64_t from = int64_t(tile.start) * PN, to = from + int64_t(tile.real) * PN;
    if (!tile.meets(panel)) {
      std::fill(x + from, x + to, 0.0f), std::fill(dx + from, dx + to, 0.0f);
      return;
    }
    scores_of(tile.rows, q + tile.start * a.dim, k, a.dim, x + from, nullptr);
    scores_of(tile.rows, d + tile.start * a.value_dim, v, a.value_dim, dx + from, nullptr);
    if (dress.needed(tile, panel)) dress(block, tile, panel, x, capped ? slope : nullptr, nullptr);
    for (int i = tile.start; i < tile.start + tile.real; i++)
      for (int64_t e = i * PN; e < (i + 1) * PN; e += W) {
        const vf w = exp2(larger(all(FLOOR), (load(x + e) - all(reference[i])) * all(dress.unit) - all(above[i])));
        store(x + e, w);
        store(dx + e, w * (load(dx + e) - all(inner[i])));
      }
    if (g.bias.data)
      for (int i = tile.start; i < tile.start + tile.real; i++) {
        float* b = static_cast<float*>(g.bias.data) + at(g.bias, block.batch, block.rows[i].head, block.rows[i].query);
        for (int64_t j = panel * PN; j < std::min<int64_t>(panel * PN + PN, a.n_key); j++)
          b[j * g.bias.stride[3]] += dx[i * PN + j - panel * PN];
      }
    for (int64_t e = from; e < to && capped; e += W) store(dx + e, load(dx + e) * load(slope + e));
  }

  // Writes the unit's sums for one head as gradients [key][dim] and [key][value_dim].
  void give(int64_t head_in_unit, float* d_key, float* d_value) const {
    const float *keys = sums + head_in_unit * head_size, *values = keys + padded_keys * width;
    for (int64_t j = 0; j < a.n_key; j++) {
      for (int64_t c = 0; c < a.dim; c++) d_key[j * a.dim + c] = keys[j * width + c] * float(a.scale);
      for (int64_t c = 0; c < a.value_dim; c++) d_value[j * a.value_dim + c] = values[j * value_width + c];
    }
  }
};

}  // namespace

void backward(const Attention& a, const Gradients& g) {
  const Plan plan(a, a.threads > 1 ? 2 * a.threads : 1);
  const int64_t heads = a.batch * a.heads, key_size = a.n_key * a.dim, value_size = a.n_key * a.value_dim;
  Memory<float> others;  // what parts of the queries after the first give, added at the end: always in the same order
  float* more = others.get((plan.parts - 1) * heads * (key_size + value_size) + 1);
  const auto d_key = [&](int64_t part, int64_t head) {
    return part ? more + ((part - 1) * heads + head) * (key_size + value_size) : g.key + head * key_size;
  };
  const auto d_value = [&](int64_t part, int64_t head) {
    return part ? d_key(part, head) + key_size : g.value + head * value_size;
  };
  const auto make = [&] { return std::make_unique<Backward>(a, g, plan); };
  share(plan.units, a.threads, make, [&](Backward& own, int64_t unit) {
    const auto of = plan.heads_of(unit);
    std::fill_n(own.sums, (of.last - of.first) * own.head_size, 0.0f);
    plan.blocks(unit, [&](const Block& block) { own.block(block, of.first); });
    for (int64_t h = of.first; h < of.last; h++) {
      const int64_t part = unit % plan.parts, head = of.batch * a.heads + h;
      own.give(h - of.first, d_key(part, head), d_value(part, head));
    }
  });
  if (plan.parts == 1) return;
  parallel(heads, a.threads, [&](int64_t head) {
    for (int64_t part = 1; part < plan.parts; part++) {
      for (int64_t i = 0; i < key_size; i++) d_key(0, head)[i] += d_key(part, head)[i];
      for (int64_t i = 0; i < value_size; i++) d_value(0, head)[i] += d_value(part, head)[i];
    }
  });
}

// ------------------------------------------------------------------------------------------------------ grids

namespace {
#include "grid.h"
}

void grid_forward(const Grid& g, const GridRows& rows) {
  walk<GridForward>(g, rows, Sight(g.n_query, g.n_key, g.first, g.stop));
}

void grid_backward(const Grid& g, const GridRows& rows) {
  walk<GridBackward<false>>(g, rows, Sight(g.n_query, g.n_key, g.first, g.stop));
  walk<GridBackward<true>>(g, rows, Sight(g.n_key, g.n_query, g.seen_first, g.seen_stop));
}

}  // namespace REGARD_ISA
