// What Python and the kernel agree on. `__init__.py` mirrors these structures field by field.
#pragma once
#include <cstdint>

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, BOOLEAN = 3 };

// Strides count elements; a stride of 0 broadcasts; no data: absent.
struct Tensor4 {
  void* data;
  int64_t stride[4];
  int64_t type;
};

struct Attention {
  // [batch, head, query, dim], [batch, kv_head, key, dim], [batch, kv_head, key, value_dim]
  int64_t batch, heads, kv_heads, n_query, n_key, dim, value_dim;
  Tensor4 query, key, value;
  Tensor4 mask, bias;  // [batch, head, query, key]: a mask is boolean (visible) or additive, a bias additive
  Tensor4 sinks;       // [batch, head, query, 1], float32
  double scale;
  double softcap;  // 0: none
  double hidden;   // score of a pair that a boolean mask hides: -inf, or finite
  // Query i sees keys i + offset - left to i + offset + right.
  int64_t offset, left, right;
  // Key blocks of each query block; as in FlexAttention's BlockMask. Strides of [batch, head, query block(, slot)].
  const int32_t *block_counts, *block_indices;
  int64_t count_stride[3], index_stride[4];
  int64_t block_query, block_key;
  int64_t threads;
};

// Every result is float32 and contiguous, and absent where not asked for; output excepted.
struct Results {
  Tensor4 output;                            // [batch, head, query, value_dim]
  float* lse;                                // [batch, head, query], nats
  float *reference, *above;                  // [batch, head, query]: the same in two parts, see below
  float *entropy, *maximum, *squares;        // [batch, head, query]
  int64_t n_distance;                        // distances |start + query - key|, clipped
  const float* clips;
  int64_t start;
  float* distance;  // [n_distance, batch, head, query]
  int64_t n_mass, mass_stride;
  const float* sets;  // [batch or 1, n_mass, key]
  float* mass;        // [n_mass, batch, head, query]
  int64_t n_received, received_stride;
  const float* groups;  // [batch or 1, n_received, query]
  float* received;      // [n_received, batch, head, key]
  int64_t k;
  float* top;       // [batch, head, query, k]
  int64_t* top_at;  // -1 where there is no such key
  int64_t n_at, at_stride;
  const int64_t* at;       // [batch or 1, n_at, query]
  float* at_weight;        // [n_at, batch, head, query]
  const float* given_lse;  // [batch, head, query]: known already, nats
};

// Gradients, float32 and contiguous; query_heads of a key head are summed by the caller. Of each row either its
// log-sum-exp is given or, which loses no digits, a score and the base-2 logarithm of the sum of weights relative to it.
struct Gradients {
  Tensor4 output, grad;  // [batch, head, query, value_dim]
  const float *lse, *reference, *above;  // [batch, head, query]
  float* query;          // [batch, head, query, dim]
  float *key, *value;    // [batch, head, key, dim], [batch, head, key, value_dim]
  Tensor4 bias;          // [batch, head, query, key] by strides; one writer for each element is the caller's care
  float* sinks;          // [batch, head, query]
};

// Attention of the positions of a grid to boxes of another, of 3 axes, the last running fastest: position i of an axis
// sees from `first` up to but not including `stop` along it, neither of which ever falls. For each side, one axis after
// another.
struct Grid {
  int64_t batch, heads, kv_heads, dim, value_dim;
  int64_t n_query[3], n_key[3];
  Tensor4 query, key, value;
  const int32_t *first, *stop;            // of queries: keys
  const int32_t *seen_first, *seen_stop;  // of keys: the queries that see them
  const float* hidden;                    // [batch or 1, key]: 0, or -inf where there is no key; or none
  int64_t hidden_stride;
  double scale;  // above 0
  int64_t threads;
};

// Of `Gradients`; `inner`: the product of output and its gradient. The backward pass does not read the output.
struct GridRows {
  Tensor4 output, grad;                // [batch, head, query, value_dim]
  float *reference, *above, *inner;    // [batch, head, query]
  float *d_query, *d_key, *d_value;    // [batch, head, query or key, dim or value_dim]
};

// Runs job(data, 0) ... job(data, count - 1), in any order, on up to `threads` threads.
using Job = void (*)(void* data, int64_t index);
void run_jobs(Job job, void* data, int64_t count, int64_t threads);

template <class F>
void parallel(int64_t count, int64_t threads, F&& f) {
  run_jobs([](void* data, int64_t i) { (*static_cast<F*>(data))(i); }, &f, count, threads);
}

#define REGARD_DECLARE(name)                         \
  namespace name {                                   \
  void forward(const Attention&, const Results&);    \
  void backward(const Attention&, const Gradients&); \
  void grid_forward(const Grid&, const GridRows&);   \
  void grid_backward(const Grid&, const GridRows&);  \
  }
REGARD_DECLARE(baseline)
REGARD_DECLARE(avx2)
REGARD_DECLARE(avx512)
#undef REGARD_DECLARE
