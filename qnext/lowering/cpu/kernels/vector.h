// Vectors of floats in the compiler's own notation, so that one source serves every machine.
#pragma once

#include <limits>
#include <utility>

#include "kernel.h"

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace qnext {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Floats load(const bf16* p) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  Words word = __builtin_convertvector(half, Words) << 16;
  Floats v;
  std::memcpy(&v, &word, sizeof v);
  return v;
}
template <class T> inline Floats load(const T* p, int64_t count) {  // count numbers, then zeros
  T numbers[LANES] = {};
  std::memcpy(numbers, p, count * sizeof(T));
  return load(numbers);
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Floats v) {  // as `narrow` of each
  Words bits;
  std::memcpy(&bits, &v, sizeof v);
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Halves half = __builtin_convertvector(v == v ? rounded : Words{} + 0x7fc0, Halves);
  std::memcpy(p, &half, sizeof half);
}

// Asks for n numbers, or whatever lies there, to be brought into the second cache: in the first they
// would push out what is under work (measured: states and keys of float32 12 to 30 % slower).
constexpr int64_t LINE = 64;  // bytes
template <class T> inline void fetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += LINE / sizeof(T)) __builtin_prefetch(p + i, 0, 2);
}

inline Floats splat(float x) { return x - Floats{}; }

// a * b + c, rounded once where the machine can. Compilers are told to fuse nothing themselves: they
// would in one tile and not in another, and a row's sum would depend on what shares its batch (gcc
// for Zen 3 does not fuse where it sees a chain of sums).
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__FMA__) && defined(__AVX512F__)
  return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__aarch64__)
  return Floats(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}

// Holds a vector in a register: GCC would rather load it again for every product it is a factor of
// (measured: 26 loads for 16 products).
inline void hold([[maybe_unused]] Floats& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// Lanes i of `even` and `odd`, of the 2 L lanes of two vectors, added: see `pairs`.
template <int N, int L> constexpr int even(int i) {
  constexpr int part = N <= 4 ? 1 : 4, group = N <= 4 ? 4 : L;  // lanes that move together, and within
  int inside = i % group, which = inside / part;
  int from = which < group / part / 2 ? 0 : L, at = which % (group / part / 2);
  return from + i - inside + 2 * at * part + inside % part;
}
template <int N, int L> constexpr int odd(int i) { return even<N, L>(i) + (N <= 4 ? 1 : 4); }

// Sums of pairs of neighbours of a, then those of b: of lanes within each four, where sums of N <= 4
// vectors are made, then of fours. So shuffles stay within 128 bits for as long as they can.
template <int N, class V, int... I> inline V pairs(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof(V) / 4;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, even<N, L>(I)...) + __builtin_shufflevector(a, b, odd<N, L>(I)...);
#else
  typedef int32_t Places __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Places{even<N, L>(I)...}) + __builtin_shuffle(a, b, Places{odd<N, L>(I)...});
#endif
}
template <int N, class V> inline V pairs(V a, V b) {
  return pairs<N>(a, b, std::make_integer_sequence<int, sizeof(V) / 4>());
}

// The lanes of a, then of b, that have even numbers, and those that have odd ones.
template <int... I> inline void split(Floats a, Floats b, Floats& even, Floats& odd, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  even = __builtin_shufflevector(a, b, 2 * I...), odd = __builtin_shufflevector(a, b, 2 * I + 1 ...);
#else
  typedef int32_t Places __attribute__((vector_size(sizeof(Floats))));
  even = __builtin_shuffle(a, b, Places{2 * I...}), odd = __builtin_shuffle(a, b, Places{2 * I + 1 ...});
#endif
}
inline void split(Floats a, Floats b, Floats& even, Floats& odd) {
  split(a, b, even, odd, std::make_integer_sequence<int, LANES>());
}

// Lane i of the result is the sum of v[i], of as many vectors as a vector has lanes.
template <int N, class V> inline V transposed_sum(const V* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    return pairs<N>(transposed_sum<N / 2>(v), transposed_sum<N / 2>(v + N / 2));
  }
}

// The sums of fewer vectors than a vector has lanes, in its first lanes.
template <int N, class V> inline V summed(V sums) {
  if constexpr (N < int(sizeof(V) / 4)) {
    return summed<2 * N>(pairs<2 * N>(sums, sums));
  } else {
    return sums;
  }
}

// The sums of N vectors, each added up in the same order whatever N is.
template <int N, class V, class E> inline void sum_each(const V* v, E* out) {
  static_assert((N & (N - 1)) == 0, "a power of 2");
  constexpr int lanes = sizeof(V) / 4, together = N < lanes ? N : lanes;
  for (int i = 0; i < N; i += together) {
    V sums = summed<together>(transposed_sum<together>(v + i));
    std::memcpy(out + i, &sums, together * sizeof(E));
  }
}

// Rows of weights come from memory in as many streams as a tile has rows; each is asked for so many
// bytes ahead, in the row after this one as well. The machine itself stops at the end of every page
// (measured: 1 to 14 % more bandwidth; into the first cache 5 to 20 % less).
constexpr int64_t AHEAD = 1024;
template <int R, class W> inline void fetch_ahead(const W* const* w, int64_t i) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) fetch(reinterpret_cast<const char*>(w[r] + i) + AHEAD, 1);
}

// out[r][t] = w[r] . x[t] over n elements. The order of a sum depends on n alone: a token's result
// is the same whatever shares its tile. What is left of n fills a vector up with zeros. `stream`
// tells whether the rows of w come from memory.
template <int R, int T, class W, class X>
inline void dots(const W* const* w, const X* const* x, int64_t n, float out[R][T], bool stream = false) {
  Floats sums[R][T] = {};
  auto add = [&](auto take) __attribute__((always_inline)) {
    Floats left[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) hold(left[r] = take(w[r]));
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) {
      Floats right = take(x[t]);
      hold(right);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sums[r][t] = fused(left[r], right, sums[r][t]);
    }
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    if (stream && i % int64_t(LINE / sizeof(W)) == 0) fetch_ahead<R>(w, i);
    add([&](auto* p) { return load(p + i); });
  }
  if (i < n) add([&](auto* p) { return load(p + i, n - i); });
  Floats all[R * T];
#pragma GCC unroll 16
  for (int k = 0; k < R * T; k++) all[k] = sums[k / T][k % T];
  sum_each<R * T>(all, out[0]);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// The same of bfloat16 rows, where the machine multiplies pairs of them: exact products, summed in
// float32 (numbers below 2^-126 count as 0).
template <int R, int T>
inline void dots(const bf16* const* w, const bf16* const* x, int64_t n, float out[R][T], bool stream = false) {
  __m512 sums[R][T];
  for (int k = 0; k < R * T; k++) sums[k / T][k % T] = _mm512_setzero_ps();
  auto add = [&](auto take) __attribute__((always_inline)) {
    __m512bh left[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) left[r] = take(w[r]);
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) {
      __m512bh right = take(x[t]);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], left[r], right);
    }
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    if (stream) fetch_ahead<R>(w, i);
    add([&](const bf16* p) { return __m512bh(_mm512_loadu_si512(p + i)); });
  }
  __mmask32 rest = (uint32_t(1) << (n - i)) - 1;  // fewer than 32
  if (rest) add([&](const bf16* p) { return __m512bh(_mm512_maskz_loadu_epi16(rest, p + i)); });
  Floats all[R * T];
#pragma GCC unroll 16
  for (int k = 0; k < R * T; k++) all[k] = Floats(sums[k / T][k % T]);
  sum_each<R * T>(all, out[0]);
}
#endif

// exp in float32 to an ulp or two: 2^k e^r with |r| <= ln 2 / 2, and a polynomial for e^r. Plain
// arithmetic, which loops over arrays turn into vectors.
inline float exponential(float x) {
  constexpr float LOG2E = 1.44269504088896341f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  float bounded = x < 88.72283f ? x : 88.72283f;
  bounded = bounded > -87.3f ? bounded : -87.3f;
  float k = std::nearbyint(bounded * LOG2E);
  float r = fused(-k, LN2_LOW, fused(-k, LN2_HIGH, bounded));
  float p = 1.9875691500e-4f;
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p, r * r, r) + 1.0f;
  // 2^k in two factors, as k may be 128
  int32_t whole = int32_t(k), half = whole / 2;
  int32_t first = (half + 127) << 23, second = (whole - half + 127) << 23;
  float a, b;
  std::memcpy(&a, &first, 4);
  std::memcpy(&b, &second, 4);
  float y = p * a * b;
  y = x > 88.72283f ? std::numeric_limits<float>::infinity() : y;
  y = x < -87.3f ? 0.0f : y;
  return x != x ? x : y;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
inline float silu(float x) { return x / (1.0f + exponential(-x)); }

}  // namespace qnext
