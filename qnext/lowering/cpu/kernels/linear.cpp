// x w^T, in float and in int8, and the rounding of tokens to int8.
#include <algorithm>

#include "product.h"
#include "quantize.h"

namespace qnext {

// Of a weight's rows, those that one task takes.
static int64_t rows_a_task(const Tensor& x, const Tensor& weight) {
  int64_t each = share(weight.size[0], TILE_ROWS, ROW_BLOCK), products = weight.size[1] * x.rows();
  int64_t least = ceil_div(PRODUCTS / (products + 1), TILE_ROWS) * TILE_ROWS;
  return std::min(std::max(each, least), ROW_BLOCK);
}
static int64_t row_tasks(const Tensor& x, const Tensor& weight) {
  return ceil_div(weight.size[0], rows_a_task(x, weight));
}
static Span rows_of(const Tensor& x, const Tensor& weight, int64_t task) {
  return Span(task, rows_a_task(x, weight), weight.size[0]);
}

// linear(x [*batch, n], weight [rows, n]) -> y [*batch, rows]
static int64_t linear_tasks(const Call& c, int64_t) { return row_tasks(c[0], c[1]); }

static void linear(const Call& c, int64_t, int64_t task) {
  const Tensor &x = c[0], &weight = c[1], &y = c[2];
  Span rows = rows_of(x, weight, task);
  with_float(x, [&](auto type) {
    using X = decltype(type);
    product<X, X>(
        rows.size(), x.rows(), x.last(), [&](int64_t i) { return weight.at<X>(rows.begin + i); },
        [&](int64_t j) { return x.row<X>(j); },
        [&](int64_t j, const float* sums) {
          X* out = y.row<X>(j) + rows.begin;
          for (int64_t i = 0; i < rows.size(); i++) out[i] = narrow<X>(sums[i]);
        });
  });
}

// int8_linear(x [*batch, n], x_scale [*batch], weight [rows, n], scale [rows]) -> y [*batch, rows]
static int64_t int8_tasks(const Call& c, int64_t) { return row_tasks(c[0], c[2]); }

static void int8_linear(const Call& c, int64_t, int64_t task) {
  const Tensor &x = c[0], &weight = c[2], &y = c[4];
  Span rows = rows_of(x, weight, task);
  const float *x_scale = c[1].at<float>(), *scale = c[3].at<float>() + rows.begin;
  product<int8_t, int8_t>(
      rows.size(), x.rows(), x.last(), [&](int64_t i) { return weight.at<int8_t>(rows.begin + i); },
      [&](int64_t j) { return x.row<int8_t>(j); },
      [&](int64_t j, const int32_t* sums) {
        float* out = y.row<float>(j) + rows.begin;
        for (int64_t i = 0; i < rows.size(); i++) out[i] = float(sums[i]) * x_scale[j] * scale[i];
      });
}

// quantize_tokens(x [*batch, n]; rounding) -> (q [*batch, n], scale [*batch])
constexpr int64_t TOKENS = 8;  // that one task rounds

static int64_t quantize_tasks(const Call& c, int64_t) {
  return ceil_div(c[0].rows(), TOKENS);
}

static void quantize_tokens(const Call& c, int64_t, int64_t task) {
  const Tensor &x = c[0], &q = c[1], &scale = c[2];
  Span tokens(task, TOKENS, x.rows());
  with_float(x, [&](auto type) {
    for (int64_t j = tokens.begin; j < tokens.end; j++)
      scale.at<float>()[j] = quantize(x.row<decltype(type)>(j), x.last(), Rounding(c.integer(0)),
                                      q.row<int8_t>(j));
  });
}

extern const Kernel LINEAR[] = {
    {"linear", 1, linear_tasks, linear},
    {"int8_linear", 1, int8_tasks, int8_linear},
    {"quantize_tokens", 1, quantize_tasks, quantize_tokens},
    {nullptr, 0, nullptr, nullptr},
};

}  // namespace qnext
