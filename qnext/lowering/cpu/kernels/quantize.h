// A token rounded to int8 with a scale of its own, in the three ways of `quantize_tokens`: each
// operation of the definition in its order, so that integers and scales are equal to its.
#pragma once

#include <limits>

#include "kernel.h"

namespace qnext {

enum Rounding : int64_t { TIMES, OVER, RECIPROCAL };
constexpr float LARGEST = 127.0f;

template <class X> float peak_of(const X* x, int64_t n) {
  // as integers: their order is that of the floats, and NaN is above all
  uint32_t peak = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t i = 0; i < n; i++) {
    float f = wide(x[i]);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    bits &= 0x7fffffff;
    peak = bits > peak ? bits : peak;
  }
  float f;
  std::memcpy(&f, &peak, 4);
  return f;
}

inline int8_t to_int8(float scaled) {
  float whole = std::nearbyint(scaled);
  whole = whole < LARGEST ? whole : LARGEST;
  return int8_t(int32_t(whole > -LARGEST ? whole : -LARGEST));
}

// Writes the integers and returns the scale.
template <class X> float quantize(const X* x, int64_t n, Rounding rounding, int8_t* q) {
  constexpr float LEAST = 2 * LARGEST / std::numeric_limits<float>::max();
  float largest = peak_of(x, n), peak = largest < LEAST ? LEAST : largest, scale, factor;
  if (rounding == OVER) {
    scale = peak * (1 / LARGEST);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) q[i] = to_int8(wide(x[i]) / scale);
  } else {
    if (rounding == TIMES) {
      factor = LARGEST / peak;
      scale = 1 / factor;
    } else {
      scale = peak / LARGEST;
      factor = 1 / scale;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) q[i] = to_int8(wide(x[i]) * factor);
  }
  return largest == 0 ? 0 : scale;
}

}  // namespace qnext
