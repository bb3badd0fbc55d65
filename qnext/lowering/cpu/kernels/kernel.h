// What a kernel is, and what it is given. One call of a lowered step is one `Call`: a kernel, its
// tensors (arguments in the order of the call's signature, then results, then the workspace if it
// has one) and its numbers. Work falls into phases, a phase into tasks that run in any order and on
// any thread; a phase begins when the one before it has ended.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qnext {

enum Kind : int64_t { F32, BF16, I8, I32, I64, BOOL };
constexpr int MAX_DIMS = 5;

struct bf16 {
  uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <class T> T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(x != x ? 0x7fc0 : rounded)};
}

struct Tensor {
  char* data;
  int64_t kind, dims;
  int64_t size[MAX_DIMS], stride[MAX_DIMS];  // in elements

  int64_t last() const { return size[dims - 1]; }
  // of [*batch, last]: how many rows there are, and where one of them begins
  int64_t rows() const {
    int64_t n = 1;
    for (int64_t i = 0; i + 1 < dims; i++) n *= size[i];
    return n;
  }
  int64_t place(int64_t row) const {
    int64_t at = 0, outer = dims - 2;
    for (; outer > 0; outer--) {
      if (size[outer] == 1) continue;  // division is what takes long here
      at += row % size[outer] * stride[outer];
      row /= size[outer];
    }
    return outer < 0 ? 0 : at + row * stride[0];
  }
  template <class T> T* row(int64_t r) const { return reinterpret_cast<T*>(data) + place(r); }
  template <class T> T* at(int64_t i = 0, int64_t j = 0, int64_t k = 0) const {
    return reinterpret_cast<T*>(data) + i * stride[0] + (j ? j * stride[1] : 0) +
           (k ? k * stride[2] : 0);
  }
  // an integer of an index tensor of one or two axes
  int64_t index(int64_t i, int64_t j = 0) const {
    int64_t at = i * stride[0] + (j ? j * stride[1] : 0);
    return kind == I64 ? reinterpret_cast<int64_t*>(data)[at] : reinterpret_cast<int32_t*>(data)[at];
  }
};

struct Call;

struct Kernel {
  const char* name;
  int64_t phases;
  int64_t (*tasks)(const Call&, int64_t phase);  // once the phases before it have ended
  void (*run)(const Call&, int64_t phase, int64_t task);
};

struct Call {
  const Kernel* kernel;
  const Tensor* tensors;
  const double* numbers;
  intptr_t* fault;  // of the whole list of calls: the call that met one, else 0

  const Tensor& operator[](int i) const { return tensors[i]; }
  float number(int i) const { return float(numbers[i]); }
  int64_t integer(int i) const { return int64_t(numbers[i]); }
  // Whether an index points to one of `size`; if not, the list of calls ends after this phase.
  bool within(int64_t index, int64_t size) const {
    bool good = index >= 0 && index < size;
    if (!good) __atomic_store_n(fault, intptr_t(this), __ATOMIC_RELAXED);
    return good;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The part of 0 .. n that a task covers, where each covers `each`.
struct Span {
  int64_t begin, end;
  Span(int64_t task, int64_t each, int64_t n)
      : begin(task * each), end(begin + each < n ? begin + each : n) {}
  int64_t size() const { return end - begin; }
};

// Products that a task makes at least: fewer take less time than threads need to share them.
constexpr int64_t PRODUCTS = 8192;

// Items a task covers: some 16 tasks or more, of at most `most` items, a multiple of `unit`.
inline int64_t share(int64_t n, int64_t unit, int64_t most) {
  int64_t each = n > 0 ? ceil_div(ceil_div(n, 16), unit) * unit : unit;  // a divisor
  return each < most ? each : most;
}

// Runs f with a value of the type that a tensor holds, float32 or bfloat16.
template <class F> void with_float(const Tensor& t, F f) {
  if (t.kind == BF16) {
    f(bf16{});
  } else {
    f(float{});
  }
}

}  // namespace qnext
