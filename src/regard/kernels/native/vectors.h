// Vectors of float of one instruction set, in the compiler's own vector types. Included once in each build of
// kernel.cpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace REGARD_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;                   // floats in a vector
constexpr int MR = 12, MC = 4, MX = 6;  // register tiles: MR rows x 2 vectors of scores, MX rows x MC vectors of output
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int MR = 6, MC = 2, MX = 6;
#else
constexpr int W = 4;
constexpr int MR = 6, MC = 2, MX = 6;
#endif
constexpr int PN = 2 * W;  // keys in a panel

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef float vf_anywhere __attribute__((vector_size(W * 4), aligned(4), may_alias));

static inline vf load(const float* p) { return *reinterpret_cast<const vf_anywhere*>(p); }
static inline void store(float* p, vf x) { *reinterpret_cast<vf_anywhere*>(p) = x; }
static inline vf all(float x) { return x - vf{}; }  // x - 0 is x, -0 and NaN included
static inline vf pick(vi condition, vf a, vf b) { return condition ? a : b; }

static inline vf shuffle(vf a, vf b, vi order) {  // lanes of a, then of b
#if defined(__clang__)
  vf out;
  for (int i = 0; i < W; i++) out[i] = order[i] < W ? a[order[i]] : b[order[i] - W];
  return out;
#else
  return __builtin_shuffle(a, b, order);
#endif
}

// The larger; b where either is NaN, so that a NaN in b survives.
static inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Of the lanes of x; no NaN survives in `largest`.
static inline float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float parts[W];
  store(parts, x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
#endif
}

static inline float largest(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float parts[W];
  store(parts, x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  return parts[0];
#endif
}

// Lane i: the sum of the lanes of a[i], of W vectors, which are used up. Neighbours are added log2(W) times.
static inline vf sums(vf* a) {
  vi even, odd;
  for (int i = 0; i < W; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
#pragma GCC unroll 4
  for (int n = W; n > 1; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; i++)
      a[i] = shuffle(a[2 * i], a[2 * i + 1], even) + shuffle(a[2 * i], a[2 * i + 1], odd);
  return a[0];
}

// Rows of W floats, `width` apart, turned: out[c * out_width + r] = in[r * width + c]. A perfect shuffle log2(W) times.
static inline void turn(const float* in, int64_t width, float* out, int64_t out_width) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256 x[8], y[8];  // a shuffle across the halves of a vector is three instructions there
  for (int r = 0; r < 8; r++) x[r] = _mm256_loadu_ps(in + r * width);
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2)
    y[r] = _mm256_unpacklo_ps(x[r], x[r + 1]), y[r + 1] = _mm256_unpackhi_ps(x[r], x[r + 1]);
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {
    x[r] = _mm256_shuffle_ps(y[r], y[r + 2], 0x44), x[r + 1] = _mm256_shuffle_ps(y[r], y[r + 2], 0xee);
    x[r + 2] = _mm256_shuffle_ps(y[r + 1], y[r + 3], 0x44), x[r + 3] = _mm256_shuffle_ps(y[r + 1], y[r + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++) {
    _mm256_storeu_ps(out + r * out_width, _mm256_permute2f128_ps(x[r], x[r + 4], 0x20));
    _mm256_storeu_ps(out + (r + 4) * out_width, _mm256_permute2f128_ps(x[r], x[r + 4], 0x31));
  }
  return;
#endif
  vi low, high;
  for (int i = 0; i < W; i++) low[i] = i / 2 + i % 2 * W, high[i] = i / 2 + W / 2 + i % 2 * W;
  vf a[W], b[W];
  for (int r = 0; r < W; r++) a[r] = load(in + r * width);
#pragma GCC unroll 4
  for (int pass = 1; pass < W; pass *= 2) {
#pragma GCC unroll 8
    for (int r = 0; r < W / 2; r++) {
      b[2 * r] = shuffle(a[r], a[r + W / 2], low);
      b[2 * r + 1] = shuffle(a[r], a[r + W / 2], high);
    }
#pragma GCC unroll 16
    for (int r = 0; r < W; r++) a[r] = b[r];
  }
  for (int r = 0; r < W; r++) store(out + r * out_width, a[r]);
}

// 2^x for x <= 0, to about 2 ulp; 0 below 2^-126; NaN of NaN.
static inline vf exp2(vf x) {
#if defined(__AVX512F__)
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
  vf p = all(2.17959979e-04f);                         // minimax on [0, 1)
  p = p * f + all(1.24143112e-03f);
  p = p * f + all(9.68126923e-03f);
  p = p * f + all(5.54824131e-02f);
  p = p * f + all(2.40229923e-01f);
  p = p * f + all(6.93147001e-01f);
  p = p * f + all(1.0f);
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf rounded = x + magic;
  const vf f = x - (rounded - magic);
  vf p = all(1.535336188e-4f);  // minimax on [-1/2, 1/2]
  p = p * f + all(1.339887440e-3f);
  p = p * f + all(9.618437358e-3f);
  p = p * f + all(5.550332471e-2f);
  p = p * f + all(2.402264791e-1f);
  p = p * f + all(6.931472029e-1f);
  p = p * f + all(1.0f);
  vu bits, result;  // unsigned: exponents below the smallest wrap around, and are set to 0 next
  memcpy(&bits, &rounded, sizeof bits);
  memcpy(&result, &p, sizeof result);
  result += bits << 23;
  vf y;
  memcpy(&y, &result, sizeof y);
  y = pick(x < all(-126.0f), all(0.0f), y);
  return pick(x == x, y, x);
#endif
}

// tanh to about 2 ulp: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
static inline vf tanh(vf x) {
  const vf z = x * x;
  vf near = all(-5.70498872745e-3f);
  near = near * z + all(2.06390887954e-2f);
  near = near * z + all(-5.37397155531e-2f);
  near = near * z + all(1.33314422036e-1f);
  near = near * z + all(-3.33332819422e-1f);
  near = near * z * x + x;
  const vf a = x < 0 ? -x : x;
  const vf e = exp2(larger(all(-100.0f), a * all(-2.885390081777927f)));  // e^-2|x|
  vf far = (all(1.0f) - e) / (all(1.0f) + e);
  far = x < 0 ? -far : far;
  return pick(a < all(0.625f), near, far);
}

static inline float weight_at(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }  // 2^x of one score

}  // namespace REGARD_ISA
