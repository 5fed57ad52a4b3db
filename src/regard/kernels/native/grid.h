// Attention of each position of a grid to a box of another: along each axis an interval. Included in kernel.cpp.
//
// Words: the *near* side is the one whose sums are made, queries in the forward pass; the *far* one is what it sees. W
// neighbours along the last axis, one in each lane, are worked on together, with up to NR rows of the axis before: what
// they see lies, lane by lane, at the same *offset*, so that no pair is computed which nobody asked for, but at borders,
// where a window is shifted inside. Both sides are turned, [dim][position], so that lanes are read as they stand.

constexpr int NR = 3;
// Offsets whose scores, and channels whose sums, R rows take at once: as many as registers hold beside what is read.
constexpr int offsets_at_once(int rows) { return W == 16 ? (rows == 3 ? 7 : 8) : rows == 3 ? 4 : rows == 2 ? 6 : 8; }
constexpr int channels_at_once(int rows) { return W == 16 ? 8 : rows == 1 && W == 8 ? 8 : 4; }
constexpr int64_t NEAR_AT_HAND = 128 * 1024;  // floats that stay in the cache
constexpr int64_t ROOM = 384;  // vectors of scores that are worked on together

// Positions of a row of `n`, from column `start` on, turned to [dim up to whole vectors][step]; zeros where there is none.
void turn_row(const Tensor4& t, int64_t batch, int64_t head, int64_t token, int64_t n, int64_t start, int64_t step,
              int64_t dim, float* rows, float* out) {
  const int64_t width = up(dim, W);
  const bool plain = t.type == FLOAT32 && t.stride[3] == 1 && dim == width;
  for (int64_t i = 0; i < step; i += W) {
    const int64_t a = start + i;
    const float* from = rows;
    int64_t apart = width;
    if (plain && a >= 0 && a + W <= n) {
      from = static_cast<const float*>(t.data) + at(t, batch, head, token + a), apart = t.stride[2];
    } else {
      std::fill(rows, rows + W * width, 0.0f);
      for (int64_t w = std::max<int64_t>(0, -a); w < W && a + w < n; w++)
        read(t, at(t, batch, head, token + a + w), dim, rows + w * width);
    }
    for (int64_t d = 0; d < width; d += W) turn(from + d, apart, out + d * step + i, step);
  }
}

// Keeps a vector in a register: left alone, the compiler reads it from memory again for each row.
inline void hold(vf& x) {
#if defined(__x86_64__)
  __asm__("" : "+x"(x));
#endif
}

// s[o][r] = near[r] . far at offset o, for R rows of NR and O offsets.
template <int R, int O>
void offset_scores(const float* near, int64_t near_row, int64_t near_step, const float* far, int64_t far_step,
                   int64_t dim, float* s) {
  vf a[R][O] = {};
  for (int64_t d = 0; d < dim; d++) {
    vf q[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) q[r] = load(near + r * near_row + d * near_step);
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) {
      vf k = load(far + d * far_step + o);
      if (R > 1) hold(k);
#pragma GCC unroll 3
      for (int r = 0; r < R; r++) a[r][o] += q[r] * k;
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < O; o++)
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) store(s + (o * NR + r) * W, a[r][o]);
}

template <int R, int O = offsets_at_once(R), class... Rest>
void some_offsets(int64_t n, Rest... rest) {
  if (n == O) offset_scores<R, O>(rest...);
  else if constexpr (O > 1) some_offsets<R, O - 1>(n, rest...);
}

struct Seen {  // a row of the far side, and which rows of a group see it
  int32_t row;
  int16_t from, to;
};

struct Piece {  // W near positions of the last axis
  int64_t column, lanes;
  int64_t low, n;  // offsets that any of them sees
  int64_t masks;   // where those of its offsets begin
  int64_t step() const { return up(n + W - 1, W); }
};

struct Mask {  // a type of ours, as Panel
  float lane[W];
  bool partial;
};

// Rows that share what is read of the far side: neighbours of the axis before the last.
struct Group {
  int64_t first, n;  // rows of the near side
  std::vector<Seen> seen;
};

// Who sees whom, from one side.
struct Sight {
  const int64_t *near, *far;
  const int32_t *first[3], *stop[3];
  std::vector<Piece> pieces;
  std::vector<Mask> masks;
  int64_t left, step, groups_each;
  int64_t rows = 1;  // of the far side, from the first to the last that a group sees

  Sight(const int64_t* near, const int64_t* far, const int32_t* firsts, const int32_t* stops) : near(near), far(far) {
    for (int axis = 0, i = 0; axis < 3; i += near[axis++]) first[axis] = firsts + i, stop[axis] = stops + i;
    int64_t begin = 0, end = far[2];
    for (int64_t c = 0; c < near[2]; c += W) {
      Piece piece = {c, std::min<int64_t>(W, near[2] - c), far[2] + near[2], 0, int64_t(masks.size())};
      int64_t high = -far[2] - near[2];
      for (int64_t i = c; i < c + piece.lanes; i++)
        if (stop[2][i] > first[2][i])
          piece.low = std::min(piece.low, first[2][i] - i), high = std::max(high, stop[2][i] - i);
      if (high > piece.low) {
        piece.n = high - piece.low;
        begin = std::min(begin, c + piece.low), end = std::max(end, c + high - 1 + W);
      }
      for (int64_t o = piece.low; o < piece.low + piece.n; o++) {
        Mask mask = {{}, false};
        for (int64_t w = 0; w < W; w++) {
          const bool there = w < piece.lanes && c + w + o >= first[2][c + w] && c + w + o < stop[2][c + w];
          mask.lane[w] = there ? 0.0f : -INF, mask.partial |= !there;
        }
        masks.push_back(mask);
      }
      pieces.push_back(piece);
    }
    left = up(-begin, W);
    step = left + std::max(up(far[2], W), up(end, W));
    groups_each = (near[1] + NR - 1) / NR;
    Group g;
    for (int64_t i = 0; i < groups(); i++) {
      int32_t low = INT32_MAX, high = 0;
      group(i, g);
      for (const Seen& seen : g.seen) low = std::min(low, seen.row), high = std::max(high, seen.row);
      rows = std::max<int64_t>(rows, high - low + 1);
    }
  }
  int64_t groups() const { return near[0] * groups_each; }
  int64_t far_rows() const { return far[0] * far[1]; }

  void group(int64_t number, Group& g) const {
    const int64_t i0 = number / groups_each, part = number % groups_each;
    const int64_t i1 = part * near[1] / groups_each;
    g.n = (part + 1) * near[1] / groups_each - i1, g.first = i0 * near[1] + i1;
    g.seen.clear();
    const int32_t *low = first[1] + i1, *high = stop[1] + i1;
    for (int64_t j1 = low[0]; j1 < high[g.n - 1]; j1++) {
      int from = 0, to = int(g.n);
      while (from < to && high[from] <= j1) ++from;
      while (from < to && low[to - 1] > j1) --to;
      for (int64_t j0 = first[0][i0]; j0 < stop[0][i0] && from < to; j0++)
        g.seen.push_back({int32_t(j0 * far[1] + j1), int16_t(from), int16_t(to)});
    }
  }
};

struct Place {  // a type of ours, as Panel
  int32_t row = -1;
};

// What some pieces see of the far rows of one head, turned as they are met. Rows that no later group sees give way.
class Turned {
  const Tensor4& t;
  const Sight& sight;
  Memory<float> memory, rows;
  std::vector<Place> held;
  int64_t batch = -1, head = -1, first = 0, size = 0;

 public:
  const int64_t dim, width;
  Turned(const Tensor4& t, const Sight& sight, int64_t dim) : t(t), sight(sight), dim(dim), width(up(dim, W)) {}
  void turn_to(int64_t new_batch, int64_t new_head, int64_t first_piece, int64_t last_piece) {
    batch = new_batch, head = new_head, first = first_piece, size = 0;
    for (int64_t p = first; p < last_piece; p++) size = std::max(size, width * sight.pieces[p].step());
    memory.get((last_piece - first) * sight.rows * size);
    held.assign((last_piece - first) * sight.rows, Place{});
  }
  const float* row(int64_t p, int64_t i) {
    const Piece& piece = sight.pieces[p];
    const int64_t slot = (p - first) * sight.rows + i % sight.rows;
    float* out = memory.own.get() + slot * size;
    if (held[slot].row != i) {
      turn_row(t, batch, head, i * sight.far[2], sight.far[2], piece.column + piece.low, piece.step(), dim,
               rows.get(W * width), out);
      held[slot].row = int32_t(i);
    }
    return out;
  }
};

// The near rows of a piece of a group: [row][width][lane].
struct Near {
  const Tensor4& t;
  const Sight& sight;
  Memory<float> memory, rows;
  const int64_t dim, width, row;
  Near(const Tensor4& t, const Sight& sight, int64_t dim)
      : t(t), sight(sight), dim(dim), width(up(dim, W)), row(width * W) {}
  void read(int64_t batch, int64_t head, const Group& g, const Piece& piece) {
    float* out = memory.get(NR * row);
    for (int64_t r = 0; r < g.n; r++)
      turn_row(t, batch, head, (g.first + r) * sight.near[2], sight.near[2], piece.column, W, dim, rows.get(W * width),
               out + r * row);
  }
};

// Sums of one piece of a group: [row][channel][lane].
struct Sums {
  Memory<float> memory, rows;
  const int64_t dim, width;
  explicit Sums(int64_t dim) : dim(dim), width(up(dim, W)) {}
  float* row(int64_t r) const { return memory.own.get() + r * width * W; }
  void clear() {
    float* p = memory.get(NR * width * W);
    std::fill(p, p + NR * width * W, 0.0f);
  }
  void scale(int64_t r, vf by) {
    for (float* p = row(r); p < row(r + 1); p += W) store(p, load(p) * by);
  }
  const float* turned(int64_t r) {  // [lane][width]
    float* out = rows.get(W * width);
    for (int64_t d = 0; d < width; d += W) turn(row(r) + d * W, W, out + d, width);
    return out;
  }
};

// One direction of one thread: scores of a piece, chunk by chunk.
struct Pieces {
  const Sight& sight;
  Group group;
  const Piece* piece;
  int64_t number;  // of the piece
  Memory<float> here, there;  // far and near positions that are hidden: 0 or -inf, laid out as the rows
  bool hides = false;

  explicit Pieces(const Sight& sight) : sight(sight) {}

  int64_t at_a_time() const { return std::max<int64_t>(1, ROOM / (NR * std::max<int64_t>(piece->n, 1))); }
  template <class T>
  T* of(T* s, int64_t e) const { return s + e * piece->n * NR * W; }
  int64_t shift() const { return sight.left + piece->column + piece->low; }

  // What a chunk reads of the far rows.
  void look(Turned& far, int64_t a, int64_t b, Memory<const float*>& memory) const {
    const float** out = memory.get(ROOM);
    for (int64_t e = a; e < b; e++) out[e - a] = far.row(number, group.seen[e].row);
  }

  template <int R>
  void score(const Near& near, const float* q, const float* k, float* out) const {
    const int64_t pieces = (piece->n + offsets_at_once(R) - 1) / offsets_at_once(R);
    for (int64_t i = 0; i < pieces; i++) {
      const int64_t o = i * piece->n / pieces, n = (i + 1) * piece->n / pieces - o;
      some_offsets<R>(n, q, near.row, W, k + o, piece->step(), near.dim, out + o * NR * W);
    }
  }

  void scores(const Near& near, const float* const* far, int64_t a, int64_t b, float* s) const {
    for (int64_t e = a; e < b; e++) {
      const Seen& seen = group.seen[e];
      const float* q = near.memory.own.get() + seen.from * near.row;
      float* out = of(s, e - a) + seen.from * W;
      const int rows = seen.to - seen.from;
      if (rows == 1) score<1>(near, q, far[e - a], out);
      else if (rows == 2) score<2>(near, q, far[e - a], out);
      else score<3>(near, q, far[e - a], out);
    }
  }

  // Scores of what is outside the window, or is not there, become -inf.
  void hide(int64_t a, int64_t b, float* s, const float* far_hidden) const {
    for (int64_t e = a; e < b; e++) {
      const Seen& seen = group.seen[e];
      for (int64_t o = 0; o < piece->n; o++) {
        const Mask& mask = sight.masks[piece->masks + o];
        if (!mask.partial && !far_hidden) continue;
        vf hidden = load(mask.lane);
        if (far_hidden) hidden += load(far_hidden + seen.row * sight.step + shift() + o);
        for (int r = seen.from; r < seen.to; r++) {
          float* x = of(s, e - a) + (o * NR + r) * W;
          store(x, pick(hidden < vf{}, all(-INF), load(x)));
        }
      }
    }
  }

  // f(entry, where its scores are) for each far row that row r sees, of entries [a, b).
  template <class F>
  void each(int64_t a, int64_t b, int64_t r, float* s, F&& f) const {
    for (int64_t e = a; e < b; e++)
      if (r >= group.seen[e].from && r < group.seen[e].to) f(group.seen[e], of(s, e - a) + r * W);
  }

  template <int R>
  void weigh(const float* const* far, const float* p, int64_t n, int64_t from, Sums& sums) const {
    constexpr int D = channels_at_once(R);
    const int64_t step = piece->step();
    for (int64_t d = 0; d < sums.width; d += D) {
      vf sum[R][D];
      for (int r = 0; r < R; r++)
        for (int i = 0; i < D; i++) sum[r][i] = load(sums.row(from + r) + (d + i) * W);
      const float* w = p + from * W;
      for (int64_t e = 0; e < n; e++) {
        const float* x = far[e] + d * step;
        for (int64_t o = 0; o < piece->n; o++, w += NR * W) {
          vf z[R];
#pragma GCC unroll 3
          for (int r = 0; r < R; r++) z[r] = load(w + r * W);
#pragma GCC unroll 8
          for (int i = 0; i < D; i++) {
            vf v = load(x + i * step + o);
            if (R > 1) hold(v);
#pragma GCC unroll 3
            for (int r = 0; r < R; r++) sum[r][i] += z[r] * v;
          }
        }
      }
      for (int r = 0; r < R; r++)
        for (int i = 0; i < D; i++) store(sums.row(from + r) + (d + i) * W, sum[r][i]);
    }
  }

  // sums += weights * far, of entries [a, b), whose weights and far rows begin with p and far.
  void add(const float* const* far, const float* p, int64_t a, int64_t b, Sums& sums) const {
    for (int64_t e = a, end; e < b; e = end) {
      const Seen& seen = group.seen[e];
      for (end = e + 1; end < b && group.seen[end].from == seen.from && group.seen[end].to == seen.to;) ++end;
      const int rows = seen.to - seen.from;
      if (rows == 1) weigh<1>(far + e - a, of(p, e - a), end - e, seen.from, sums);
      else if (rows == 2) weigh<2>(far + e - a, of(p, e - a), end - e, seen.from, sums);
      else weigh<3>(far + e - a, of(p, e - a), end - e, seen.from, sums);
    }
  }

  int64_t token(int64_t r) const { return (group.first + r) * sight.near[2] + piece->column; }
};

// A row of the other side's numbers, one for each position, laid out as Turned lays out rows.
void spread(const Sight& sight, const float* from, float fill, Memory<float>& memory) {
  float* out = memory.get(sight.far_rows() * sight.step);
  std::fill(out, out + sight.far_rows() * sight.step, fill);
  for (int64_t i = 0; i < sight.far_rows(); i++)
    std::copy(from + i * sight.far[2], from + (i + 1) * sight.far[2], out + i * sight.step + sight.left);
}

vf some(const float* from, int64_t n, float fill) {
  alignas(64) float lanes[W];
  for (int64_t w = 0; w < W; w++) lanes[w] = w < n ? from[w] : fill;
  return load(lanes);
}

struct GridForward : Pieces {
  const Grid& g;
  const GridRows& rows;
  Near query;
  Turned key, value;
  Sums sums;
  Memory<float> scores_memory, hidden;
  Memory<const float*> keys, values;
  int64_t hidden_of = -1;
  const float unit;

  GridForward(const Grid& g, const GridRows& rows, const Sight& sight)
      : Pieces(sight),
        g(g),
        rows(rows),
        query(g.query, sight, g.dim),
        key(g.key, sight, g.dim),
        value(g.value, sight, g.value_dim),
        sums(g.value_dim),
        unit(float(g.scale * 1.4426950408889634)) {}

  void walk(int64_t head_of_batch, int64_t first, int64_t last) {
    const int64_t batch = head_of_batch / g.heads, head = head_of_batch % g.heads, kv_head = head / (g.heads / g.kv_heads);
    key.turn_to(batch, kv_head, first, last), value.turn_to(batch, kv_head, first, last);
    if (g.hidden && hidden_of != batch) spread(sight, g.hidden + batch * g.hidden_stride, 0.0f, hidden), hidden_of = batch;
    for (int64_t i = 0; i < sight.groups(); i++) {
      sight.group(i, group);
      for (number = first; number < last; number++) {
        piece = &sight.pieces[number];
        query.read(batch, head, group, *piece);
        block(batch, head);
      }
    }
  }

  void block(int64_t batch, int64_t head) {
    const int64_t n = int64_t(group.seen.size()), chunk = at_a_time();
    vf top[NR], total[NR];
    for (int r = 0; r < NR; r++) top[r] = all(-INF), total[r] = vf{};
    sums.clear();
    float* s = scores_memory.get(chunk * piece->n * NR * W + W);
    for (int64_t a = 0; a < n; a += chunk) {
      const int64_t b = std::min(n, a + chunk);
      look(key, a, b, keys), look(value, a, b, values);
      scores(query, keys.own.get(), a, b, s);
      hide(a, b, s, g.hidden ? hidden.own.get() : nullptr);
      for (int64_t r = 0; r < group.n; r++) {
        const vf before = top[r];
        vf highest = before, sum = {};
        each(a, b, r, s, [&](const Seen&, const float* x) {
          for (int64_t o = 0; o < piece->n; o++) highest = larger(highest, load(x + o * NR * W));
        });
        const vf by = pick(highest > all(-INF), highest, vf{});
        top[r] = highest;
        if (a > 0) {
          const vf factor = exp2(larger(all(FLOOR), (before - by) * all(unit)));
          total[r] *= factor, sums.scale(r, factor);
        }
        each(a, b, r, s, [&](const Seen&, float* x) {
          for (int64_t o = 0; o < piece->n; o++, x += NR * W) {
            const vf p = exp2(larger(all(FLOOR), (load(x) - by) * all(unit)));
            store(x, p);
            sum += p;
          }
        });
        total[r] += sum;
      }
      add(values.own.get(), s, a, b, sums);
    }
    for (int64_t r = 0; r < group.n; r++) {
      sums.scale(r, pick(total[r] == vf{}, vf{}, all(1.0f) / total[r]));
      const float* out = sums.turned(r);
      for (int64_t w = 0; w < piece->lanes; w++)
        write(rows.output, at(rows.output, batch, head, token(r) + w), g.value_dim, out + w * sums.width);
      if (!rows.reference) continue;
      const int64_t to = (batch * g.heads + head) * g.n_query[0] * g.n_query[1] * g.n_query[2] + token(r);
      for (int64_t w = 0; w < piece->lanes; w++) {
        rows.reference[to + w] = top[r][w] > -INF ? top[r][w] : 0.0f;
        rows.above[to + w] = total[r][w] == 0.0f ? INF : std::log2(total[r][w]);
      }
    }
  }
};

// Gradients of one side: of queries, or of keys and values, whose far side are queries and the gradient of the output.
template <bool OF_KEYS>
struct GridBackward : Pieces {
  const Grid& g;
  const GridRows& rows;
  Near one, two;       // query and gradient, or key and value
  Turned far, other;   // key and value, or query and gradient
  Sums sums, sums_of_values;
  Memory<float> scores_memory, hidden, reference, above, inner;
  Memory<const float*> ones, others;
  int64_t hidden_of = -1, spread_of = -1;
  const float unit;

  GridBackward(const Grid& g, const GridRows& rows, const Sight& sight)
      : Pieces(sight),
        g(g),
        rows(rows),
        one(OF_KEYS ? g.key : g.query, sight, g.dim),
        two(OF_KEYS ? g.value : rows.grad, sight, g.value_dim),
        far(OF_KEYS ? g.query : g.key, sight, g.dim),
        other(OF_KEYS ? rows.grad : g.value, sight, g.value_dim),
        sums(g.dim),
        sums_of_values(g.value_dim),
        unit(float(g.scale * 1.4426950408889634)) {}

  void walk(int64_t head_of_batch, int64_t first, int64_t last) {
    const int64_t batch = head_of_batch / g.heads, head = head_of_batch % g.heads;
    const int64_t kv_head = head / (g.heads / g.kv_heads), own = OF_KEYS ? kv_head : head;
    const int64_t n_query = g.n_query[0] * g.n_query[1] * g.n_query[2];
    far.turn_to(batch, OF_KEYS ? head : kv_head, first, last), other.turn_to(batch, OF_KEYS ? head : kv_head, first, last);
    if (OF_KEYS && spread_of != head_of_batch) {
      spread(sight, rows.reference + head_of_batch * n_query, 0.0f, reference);
      spread(sight, rows.above + head_of_batch * n_query, INF, above);
      spread(sight, rows.inner + head_of_batch * n_query, 0.0f, inner);
      spread_of = head_of_batch;
    }
    if (!OF_KEYS && g.hidden && hidden_of != batch)
      spread(sight, g.hidden + batch * g.hidden_stride, 0.0f, hidden), hidden_of = batch;
    for (int64_t i = 0; i < sight.groups(); i++) {
      sight.group(i, group);
      for (number = first; number < last; number++) {
        piece = &sight.pieces[number];
        one.read(batch, own, group, *piece), two.read(batch, own, group, *piece);
        block(batch, head, head_of_batch * n_query);
      }
    }
  }

  void block(int64_t batch, int64_t head, int64_t start) {
    const int64_t n = int64_t(group.seen.size()), chunk = at_a_time(), size = chunk * piece->n * NR * W + W;
    sums.clear();
    if (OF_KEYS) sums_of_values.clear();
    float *s = scores_memory.get(2 * size), *d = s + size;
    for (int64_t a = 0; a < n; a += chunk) {
      const int64_t b = std::min(n, a + chunk);
      look(far, a, b, ones), look(other, a, b, others);
      scores(one, ones.own.get(), a, b, s), scores(two, others.own.get(), a, b, d);
      hide(a, b, s, !OF_KEYS && g.hidden ? hidden.own.get() : nullptr);
      for (int64_t r = 0; r < group.n; r++) {
        vf by = {}, over = {}, mean = {}, gone = {};
        const int64_t i = token(r), lanes = piece->lanes;
        if (!OF_KEYS) {
          by = some(rows.reference + start + i, lanes, 0.0f), over = some(rows.above + start + i, lanes, INF);
          mean = some(rows.inner + start + i, lanes, 0.0f);
        } else if (g.hidden) {
          gone = some(g.hidden + batch * g.hidden_stride + i, lanes, 0.0f);
        }
        each(a, b, r, s, [&](const Seen& seen, float* x) {
          float* y = d + (x - s);
          const int64_t at = seen.row * sight.step + shift();
          for (int64_t o = 0; o < piece->n; o++, x += NR * W, y += NR * W) {
            if (OF_KEYS) {
              by = load(reference.own.get() + at + o), over = load(above.own.get() + at + o);
              mean = load(inner.own.get() + at + o);
            }
            const vf score = pick(gone < vf{}, all(-INF), load(x));
            const vf p = exp2(larger(all(FLOOR), (score - by) * all(unit) - over));
            if (OF_KEYS) store(x, p);
            store(y, p * (load(y) - mean));
          }
        });
      }
      add(ones.own.get(), d, a, b, sums);
      if (OF_KEYS) add(others.own.get(), s, a, b, sums_of_values);
    }
    for (int64_t r = 0; r < group.n; r++) {
      sums.scale(r, all(float(g.scale)));
      const int64_t n_near = sight.near[0] * sight.near[1] * sight.near[2];
      const int64_t to = (batch * g.heads + head) * n_near + token(r);
      give(sums, r, (OF_KEYS ? rows.d_key : rows.d_query) + to * g.dim);
      if (OF_KEYS) give(sums_of_values, r, rows.d_value + to * g.value_dim);
    }
  }

  void give(Sums& sums, int64_t r, float* to) const {
    const float* out = sums.turned(r);
    for (int64_t w = 0; w < piece->lanes; w++)
      std::copy(out + w * sums.width, out + w * sums.width + sums.dim, to + w * sums.dim);
  }
};

template <class Way>
void walk(const Grid& g, const GridRows& rows, const Sight& sight) {
  // Pieces side by side read the same rows; as many go down together as leave what they see in the cache.
  const int64_t pieces = int64_t(sight.pieces.size());
  int64_t step = 1;
  for (const Piece& piece : sight.pieces) step = std::max(step, piece.step());
  const int64_t most = std::max<int64_t>(1, NEAR_AT_HAND / (sight.rows * step * (g.dim + g.value_dim)));
  const int64_t strips = std::max((pieces + most - 1) / most, std::min(pieces, g.threads / (g.batch * g.heads)));
  const auto make = [&] { return std::make_unique<Way>(g, rows, sight); };
  share(g.batch * g.heads * strips, g.threads, make, [&](Way& own, int64_t unit) {
    const int64_t strip = unit % strips;
    own.walk(unit / strips, strip * pieces / strips, (strip + 1) * pieces / strips);
  });
}
