// Exact products of int8 rows: weights in -128 .. 127, tokens in -127 .. 127, sums in int32 (which
// hold 2^16 products of unsigned by signed). Each machine's way gives the same integers.
#pragma once

#include "vector.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace qnext {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// Up to 64 bytes; what is not there is 0.
inline __m512i some(const int8_t* p, int64_t n) {
  return _mm512_maskz_loadu_epi8(n < 64 ? (__mmask64(1) << n) - 1 : ~__mmask64(0), p);
}

// The instruction multiplies unsigned by signed: (w + 128) . x, less 128 times the sum of x, which
// the caller computes once for all rows. Beyond the end a weight is 0 + 128 and meets a token's 0.
inline int32_t excess(const int8_t* x, int64_t n) {
  const __m512i flip = _mm512_set1_epi8(char(0x80));  // 128 as an unsigned byte
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 64) sum = _mm512_dpbusd_epi32(sum, flip, some(x + i, n - i));
  return _mm512_reduce_add_epi32(sum);
}

template <int R, int T>
inline void int8_dots(const int8_t* const* w, const int8_t* const* x, int64_t n, int32_t out[R][T],
                      bool stream) {
  const __m512i flip = _mm512_set1_epi8(char(0x80));
  __m512i sums[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) sums[r][t] = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 64) {
    if (stream) fetch_ahead<R>(w, i);
    __m512i left[R];
    for (int r = 0; r < R; r++) left[r] = _mm512_xor_si512(some(w[r] + i, n - i), flip);
    for (int t = 0; t < T; t++) {
      __m512i right = some(x[t] + i, n - i);
      for (int r = 0; r < R; r++) sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], left[r], right);
    }
  }
  typedef int32_t Ints __attribute__((vector_size(64)));
  Ints all[R * T];
  for (int k = 0; k < R * T; k++) all[k] = Ints(sums[k / T][k % T]);
  sum_each<R * T>(all, out[0]);
}

#elif defined(__AVX2__)

inline int32_t excess(const int8_t*, int64_t) { return 0; }

inline __m256i sixteen(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Widened to 16 bits; a pair of products fits 32. (The 8-bit instruction saturates at 16.)
template <int R, int T>
inline void int8_dots(const int8_t* const* w, const int8_t* const* x, int64_t n, int32_t out[R][T],
                      bool stream) {
  __m256i sums[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) sums[r][t] = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    if (stream && i % LINE == 0) fetch_ahead<R>(w, i);
    __m256i left[R];
    for (int r = 0; r < R; r++) left[r] = sixteen(w[r] + i);
    for (int t = 0; t < T; t++) {
      __m256i right = sixteen(x[t] + i);
      for (int r = 0; r < R; r++)
        sums[r][t] = _mm256_add_epi32(sums[r][t], _mm256_madd_epi16(left[r], right));
    }
  }
  typedef int32_t Ints __attribute__((vector_size(32)));
  Ints all[R * T];
  for (int k = 0; k < R * T; k++) all[k] = Ints(sums[k / T][k % T]);
  sum_each<R * T>(all, out[0]);
  for (; i < n; i++)
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) out[r][t] += int32_t(w[r][i]) * x[t][i];
}

#else

inline int32_t excess(const int8_t*, int64_t) { return 0; }

template <int R, int T>
inline void int8_dots(const int8_t* const* w, const int8_t* const* x, int64_t n, int32_t out[R][T],
                      bool) {
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      int32_t total = 0;
      for (int64_t i = 0; i < n; i++) total += int32_t(w[r][i]) * x[t][i];
      out[r][t] = total;
    }
}

#endif

}  // namespace qnext
