// Mixture of experts: routing, and the experts' weighted sum with float or int8 weights.
#include <algorithm>
#include <vector>

#include "product.h"
#include "quantize.h"

namespace qnext {

constexpr int64_t TOKENS = 8;  // that one task routes, rounds or sums up
// Of an expert's weights, rows that one task takes: as many as a block of products has, of which the
// first product makes two a row of its result.
constexpr int64_t UP_ROWS = ROW_BLOCK / 2, DOWN_ROWS = ROW_BLOCK;

// route(logits [tokens, experts]; topk, renormalise) -> (weight [tokens, topk], expert [...])
static int64_t route_tasks(const Call& c, int64_t) {
  return ceil_div(c[0].size[0], TOKENS);
}

template <class X>
static void route_token(const X* logits, int64_t n, int64_t topk, bool renormalise, X* weight,
                        int64_t* expert) {
  std::vector<float> p(n);
  float peak = wide(logits[0]), total = 0, chosen = 0;
  for (int64_t e = 0; e < n; e++) peak = std::max(peak, wide(logits[e]));
  for (int64_t e = 0; e < n; e++) total += p[e] = std::exp(wide(logits[e]) - peak);
  for (int64_t k = 0; k < topk; k++) {
    int64_t best = std::max_element(p.begin(), p.end()) - p.begin();
    expert[k] = best;
    weight[k] = narrow<X>(p[best] / total);
    chosen += p[best] / total;
    p[best] = -1;
  }
  if (renormalise)
    for (int64_t k = 0; k < topk; k++)
      weight[k] = narrow<X>(std::exp(wide(logits[expert[k]]) - peak) / total / chosen);
}

static void route(const Call& c, int64_t, int64_t task) {
  const Tensor &logits = c[0], &weight = c[1], &expert = c[2];
  Span tokens(task, TOKENS, logits.size[0]);
  with_float(logits, [&](auto type) {
    using X = decltype(type);
    for (int64_t j = tokens.begin; j < tokens.end; j++)
      route_token(logits.at<X>(j), logits.last(), c.integer(0), c.integer(1), weight.at<X>(j),
                  expert.at<int64_t>(j));
  });
}

// Which pairs of token and choice go to each expert. Pair p is choice p % topk of token p / topk;
// `pair` lists them expert by expert, the k-th expert that is hit has first[k] .. first[k + 1].
// A number that is no expert's belongs to another rank: its pairs are passed over.
struct Groups {
  int32_t *hits, *expert, *first, *pair;

  static int64_t bytes(int64_t experts, int64_t pairs) { return 4 * (1 + experts + experts + 1 + pairs); }
  Groups(char* at, int64_t experts) {
    hits = reinterpret_cast<int32_t*>(at);
    expert = hits + 1;
    first = expert + experts;
    pair = first + experts + 1;
  }
  void fill(const Tensor& chosen, int64_t experts) {
    int64_t topk = chosen.size[1], pairs = chosen.size[0] * topk;
    auto expert_of = [&](int64_t p) { return std::min(chosen.index(p / topk, p % topk), experts); };
    std::vector<int32_t> at(experts + 2, 0);
    for (int64_t p = 0; p < pairs; p++) at[expert_of(p) + 1]++;
    *hits = first[0] = 0;
    for (int64_t e = 0; e < experts; e++) {
      if (at[e + 1]) {
        expert[*hits] = int32_t(e);
        first[++*hits] = at[e] + at[e + 1];
      }
      at[e + 1] += at[e];
    }
    for (int64_t p = 0; p < pairs; p++)
      if (expert_of(p) < experts) pair[at[expert_of(p)]++] = int32_t(p);
  }
};

// The tensors of a call of experts and its workspace, with float weights or with int8.
struct Experts {
  const Tensor &x, &chosen, &weight, &gate_up, &down, &y;
  const Tensor *gate_up_scale = nullptr, *down_scale = nullptr;
  int64_t tokens, topk, pairs, d, ffn, count;
  char* space;

  // [groups][inner of each pair, float or as x][result of each pair, float][scales of tokens][of
  // pairs][integers of tokens][of pairs]
  explicit Experts(const Call& c, bool int8)
      : x(c[0]), chosen(c[1]), weight(c[2]), gate_up(c[3]), down(c[int8 ? 5 : 4]),
        y(c[int8 ? 7 : 5]) {
    tokens = x.size[0], d = x.size[1], topk = chosen.size[1], pairs = tokens * topk;
    count = gate_up.size[0], ffn = gate_up.size[1] / 2;
    if (int8) gate_up_scale = &c[4], down_scale = &c[6];
    space = c[int8 ? 8 : 6].data;
  }
  Groups groups() const { return Groups(space, count); }
  bool is_here(int64_t pair) const { return chosen.index(pair / topk, pair % topk) < count; }
  template <class I = float> I* inner(int64_t pair = 0) const {
    return reinterpret_cast<I*>(space + Groups::bytes(count, pairs)) + pair * ffn;
  }
  float* result() const { return inner(pairs); }
  float* token_scale() const { return result() + pairs * d; }
  float* pair_scale() const { return token_scale() + tokens; }
  int8_t* token_q() const { return reinterpret_cast<int8_t*>(pair_scale() + pairs); }
  int8_t* pair_q() const { return token_q() + tokens * d; }

  // Tasks of a product whose weights have n rows: some of them, of one expert, in each.
  int64_t tasks(int64_t n, int64_t rows) const { return *groups().hits * ceil_div(n, rows); }
};

struct Part {  // of an expert's work: some of its rows, for all the pairs that want it
  int64_t expert, first, count;
  Span rows;
  Part(const Groups& g, int64_t task, int64_t n, int64_t each)
      : rows(task % ceil_div(n, each), each, n) {
    int64_t hit = task / ceil_div(n, each);
    expert = g.expert[hit], first = g.first[hit], count = g.first[hit + 1] - first;
  }
};

// Where the scales of a part's expert begin, if there are any.
static int64_t first_scale(const Tensor* scale, const Part& part) {
  return scale ? part.expert * scale->stride[0] : 0;
}

// inner[pair] = silu(gate x) * up x, for some columns of `inner`, which is of type I. Tokens are of
// type X, weights of type W; `real(sum, row, pair)` makes a product a number.
template <class I, class W, class X, class Token, class Real>
static void up(const Experts& e, int64_t task, Token token, Real real) {
  Groups g = e.groups();
  Part part(g, task, e.ffn, UP_ROWS);
  int64_t width = part.rows.size(), begin = part.rows.begin;
  const W* weights = e.gate_up.at<W>(part.expert);
  product<W, X>(
      2 * width, part.count, e.d,
      [&](int64_t i) {  // rows of the gate, then those of up beside them
        return weights + (begin + (i < width ? i : e.ffn + i - width)) * e.gate_up.stride[1];
      },
      [&](int64_t j) { return token(g.pair[part.first + j]); },
      [&](int64_t j, const auto* sums) {
        int64_t pair = g.pair[part.first + j], row = first_scale(e.gate_up_scale, part) + begin;
        I* inner = e.inner<I>(pair) + begin;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
          float gate = real(sums[i], row + i, pair), up = real(sums[width + i], row + e.ffn + i, pair);
          inner[i] = narrow<I>(silu(gate) * up);
        }
      });
}

// result[pair] = down inner, for some rows of `down`.
template <class W, class X, class Token, class Real>
static void down(const Experts& e, int64_t task, Token token, Real real) {
  Groups g = e.groups();
  Part part(g, task, e.d, DOWN_ROWS);
  const W* weights = e.down.at<W>(part.expert);
  product<W, X>(
      part.rows.size(), part.count, e.ffn,
      [&](int64_t i) { return weights + (part.rows.begin + i) * e.down.stride[1]; },
      [&](int64_t j) { return token(g.pair[part.first + j]); },
      [&](int64_t j, const auto* sums) {
        int64_t pair = g.pair[part.first + j], row = first_scale(e.down_scale, part) + part.rows.begin;
        float* result = e.result() + pair * e.d + part.rows.begin;
        for (int64_t i = 0; i < part.rows.size(); i++) result[i] = real(sums[i], row + i, pair);
      });
}

// y = sum of weight * result over a token's choices, in the order of their experts.
template <class X> static void combine(const Experts& e, int64_t task) {
  Span tokens(task, TOKENS, e.tokens);
  std::vector<int64_t> order(e.topk);
  std::vector<float> total(e.d);
  for (int64_t j = tokens.begin; j < tokens.end; j++) {
    for (int64_t k = 0; k < e.topk; k++) order[k] = k;
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return e.chosen.index(j, a) < e.chosen.index(j, b); });
    std::fill(total.begin(), total.end(), 0.0f);
    for (int64_t k : order) {
      if (!e.is_here(j * e.topk + k)) continue;
      const float* result = e.result() + (j * e.topk + k) * e.d;
      float w = wide(e.weight.at<X>(j)[k]);
      for (int64_t i = 0; i < e.d; i++) total[i] += wide(narrow<X>(wide(narrow<X>(result[i])) * w));
    }
    for (int64_t i = 0; i < e.d; i++) e.y.at<X>(j)[i] = narrow<X>(total[i]);
  }
}

// experts(x, expert, weight, gate_up, down) -> y, workspace
static int64_t experts_tasks(const Call& c, int64_t phase) {
  Experts e(c, false);
  switch (phase) {
    case 0: return 1;
    case 1: return e.tasks(e.ffn, UP_ROWS);
    case 2: return e.tasks(e.d, DOWN_ROWS);
    default: return ceil_div(e.tokens, TOKENS);
  }
}

static void experts(const Call& c, int64_t phase, int64_t task) {
  Experts e(c, false);
  auto real = [](float sum, int64_t, int64_t) { return sum; };
  with_float(e.x, [&](auto type) {
    using X = decltype(type);
    if (phase == 0) e.groups().fill(e.chosen, e.count);
    if (phase == 1)
      up<X, X, X>(e, task, [&](int64_t p) { return e.x.template at<X>(p / e.topk); }, real);
    if (phase == 2) down<X, X>(e, task, [&](int64_t p) { return e.inner<X>(p); }, real);
    if (phase == 3) combine<X>(e, task);
  });
}

// int8_experts(x, expert, weight, gate_up, its scale, down, its scale) -> y, workspace
static int64_t int8_tasks(const Call& c, int64_t phase) {
  Experts e(c, true);
  switch (phase) {
    case 0: return 1 + ceil_div(e.tokens, TOKENS);
    case 1: return e.tasks(e.ffn, UP_ROWS);
    case 2: return ceil_div(e.pairs, TOKENS);
    case 3: return e.tasks(e.d, DOWN_ROWS);
    default: return ceil_div(e.tokens, TOKENS);
  }
}

template <class X> static void round_tokens(const Experts& e, int64_t task) {
  Span tokens(task, TOKENS, e.tokens);
  for (int64_t j = tokens.begin; j < tokens.end; j++)
    e.token_scale()[j] = quantize(e.x.at<X>(j), e.d, TIMES, e.token_q() + j * e.d);
}

static void round_pairs(const Experts& e, int64_t task) {
  Span pairs(task, TOKENS, e.pairs);
  for (int64_t p = pairs.begin; p < pairs.end; p++)
    if (e.is_here(p)) e.pair_scale()[p] = quantize(e.inner(p), e.ffn, RECIPROCAL, e.pair_q() + p * e.ffn);
}

static void int8_experts(const Call& c, int64_t phase, int64_t task) {
  Experts e(c, true);
  const float *up_scale = e.gate_up_scale->at<float>(), *down_scale = e.down_scale->at<float>();
  auto inner = [&](int32_t sum, int64_t row, int64_t pair) {
    return float(sum) * e.token_scale()[pair / e.topk] * up_scale[row];
  };
  auto result = [&](int32_t sum, int64_t row, int64_t pair) {
    return float(sum) * e.pair_scale()[pair] * down_scale[row];
  };
  with_float(e.x, [&](auto type) {
    using X = decltype(type);
    if (phase == 0 && task == 0) e.groups().fill(e.chosen, e.count);
    if (phase == 0 && task > 0) round_tokens<X>(e, task - 1);
    if (phase == 1)
      up<float, int8_t, int8_t>(
          e, task, [&](int64_t p) { return e.token_q() + p / e.topk * e.d; }, inner);
    if (phase == 2) round_pairs(e, task);
    if (phase == 3)
      down<int8_t, int8_t>(
          e, task, [&](int64_t p) { return e.pair_q() + p * e.ffn; }, result);
    if (phase == 4) combine<X>(e, task);
  });
}

extern const Kernel EXPERTS[] = {
    {"route", 1, route_tasks, route},
    {"experts", 4, experts_tasks, experts},
    {"int8_experts", 5, int8_tasks, int8_experts},
    {nullptr, 0, nullptr, nullptr},
};

}  // namespace qnext
