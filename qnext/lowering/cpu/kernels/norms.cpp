// Normalisations of rows and what acts on each number by itself.
#include "vector.h"

namespace qnext {

constexpr int64_t NUMBERS = 8192;  // that one task passes over

static int64_t rows_a_task(const Tensor& x) {
  return x.last() > 0 && x.last() < NUMBERS ? NUMBERS / x.last() : 1;
}

static int64_t row_tasks(const Call& c, int64_t) {
  return ceil_div(c[0].rows(), rows_a_task(c[0]));
}

// f(row) for the rows of a task.
template <class F> static void each_row(const Call& c, int64_t task, F f) {
  Span rows(task, rows_a_task(c[0]), c[0].rows());
  for (int64_t r = rows.begin; r < rows.end; r++) f(r);
}

template <class X> static float sum_of_squares(const X* x, int64_t n) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total = fused(wide(x[i]), wide(x[i]), total);
  return total;
}

// rms_norm(x [*batch, d], weight [d]; eps) -> y
static void rms_norm(const Call& c, int64_t, int64_t task) {
  with_float(c[0], [&](auto type) {
    using X = decltype(type);
    with_float(c[1], [&](auto weight_type) {
      const auto* weight = c[1].at<decltype(weight_type)>();
      int64_t n = c[0].last();
      each_row(c, task, [&](int64_t r) {
        const X* x = c[0].row<X>(r);
        X* y = c[2].row<X>(r);
        float scale = 1 / std::sqrt(sum_of_squares(x, n) / n + c.number(0));
        for (int64_t i = 0; i < n; i++) y[i] = narrow<X>(wide(x[i]) * scale * (1 + wide(weight[i])));
      });
    });
  });
}

// gated_rms_norm(x [*batch, d], weight [d], gate [*batch, d]; eps) -> y
static void gated_rms_norm(const Call& c, int64_t, int64_t task) {
  with_float(c[0], [&](auto type) {
    using X = decltype(type);
    with_float(c[1], [&](auto weight_type) {
      const auto* weight = c[1].at<decltype(weight_type)>();
      int64_t n = c[0].last();
      each_row(c, task, [&](int64_t r) {
        const X *x = c[0].row<X>(r), *gate = c[2].row<X>(r);
        X* y = c[3].row<X>(r);
        float scale = 1 / std::sqrt(sum_of_squares(x, n) / n + c.number(0));
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
          y[i] = narrow<X>(wide(x[i]) * scale * wide(weight[i]) * silu(wide(gate[i])));
      });
    });
  });
}

// l2_norm(x [*batch, d]; eps) -> y
static void l2_norm(const Call& c, int64_t, int64_t task) {
  with_float(c[0], [&](auto type) {
    using X = decltype(type);
    int64_t n = c[0].last();
    each_row(c, task, [&](int64_t r) {
      const X* x = c[0].row<X>(r);
      X* y = c[1].row<X>(r);
      float scale = 1 / std::sqrt(sum_of_squares(x, n) + c.number(0));
      for (int64_t i = 0; i < n; i++) y[i] = narrow<X>(wide(x[i]) * scale);
    });
  });
}

// swiglu(gate [*batch, f], up [*batch, f]) -> y
static void swiglu(const Call& c, int64_t, int64_t task) {
  with_float(c[0], [&](auto type) {
    using X = decltype(type);
    each_row(c, task, [&](int64_t r) {
      const X *gate = c[0].row<X>(r), *up = c[1].row<X>(r);
      X* y = c[2].row<X>(r);
#pragma omp simd
      for (int64_t i = 0; i < c[0].last(); i++) y[i] = narrow<X>(silu(wide(gate[i])) * wide(up[i]));
    });
  });
}

// add(a, b) -> y
static void add(const Call& c, int64_t, int64_t task) {
  with_float(c[0], [&](auto type) {
    using X = decltype(type);
    each_row(c, task, [&](int64_t r) {
      const X *a = c[0].row<X>(r), *b = c[1].row<X>(r);
      X* y = c[2].row<X>(r);
      for (int64_t i = 0; i < c[0].last(); i++) y[i] = narrow<X>(wide(a[i]) + wide(b[i]));
    });
  });
}

// gate(x [*batch, d], gate [*batch, d or 1]) -> x * sigmoid(gate)
static void gate(const Call& c, int64_t, int64_t task) {
  with_float(c[0], [&](auto type) {
    using X = decltype(type);
    bool one = c[1].last() == 1;
    each_row(c, task, [&](int64_t r) {
      const X *x = c[0].row<X>(r), *g = c[1].row<X>(r);
      X* y = c[2].row<X>(r);
      float shared = sigmoid(wide(g[0]));
      if (one) {
        for (int64_t i = 0; i < c[0].last(); i++) y[i] = narrow<X>(wide(x[i]) * shared);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < c[0].last(); i++) y[i] = narrow<X>(wide(x[i]) * sigmoid(wide(g[i])));
      }
    });
  });
}

// cast(x) -> y of another dtype
static void cast(const Call& c, int64_t, int64_t task) {
  with_float(c[0], [&](auto from) {
    with_float(c[1], [&](auto to) {
      each_row(c, task, [&](int64_t r) {
        const auto* x = c[0].row<decltype(from)>(r);
        auto* y = c[1].row<decltype(to)>(r);
        for (int64_t i = 0; i < c[0].last(); i++) y[i] = narrow<decltype(to)>(wide(x[i]));
      });
    });
  });
}

extern const Kernel NORMS[] = {
    {"rms_norm", 1, row_tasks, rms_norm},
    {"gated_rms_norm", 1, row_tasks, gated_rms_norm},
    {"l2_norm", 1, row_tasks, l2_norm},
    {"swiglu", 1, row_tasks, swiglu},
    {"add", 1, row_tasks, add},
    {"gate", 1, row_tasks, gate},
    {"cast", 1, row_tasks, cast},
    {nullptr, 0, nullptr, nullptr},
};

}  // namespace qnext
