// Grouped-query attention over pages: rotary embedding, the write of keys and values, attention.
#include <algorithm>
#include <vector>

#include "product.h"

namespace qnext {

constexpr int64_t TOKENS = 4;   // that one task turns or writes
constexpr int64_t QUERIES = 8;  // of a row, that one task answers

// rotary(query [batch, seq, hq, hd], key [batch, seq, hkv, hd], position [batch, seq],
// frequency [pairs]; factor) -> (query, key)
static int64_t token_tasks(const Call& c, int64_t phase) {
  const Tensor& x = c[0];
  return phase ? DONE : ceil_div(x.size[0] * x.size[1], TOKENS);
}

template <class X>
static void turn(const Tensor& from, const Tensor& to, int64_t b, int64_t t, const float* cos,
                 const float* sin, int64_t pairs) {
  for (int64_t h = 0; h < from.size[2]; h++) {
    const X* x = from.at<X>(b, t, h);
    X* y = to.at<X>(b, t, h);
    for (int64_t i = 0; i < pairs; i++) {
      float low = wide(x[i]), high = wide(x[i + pairs]);
      y[i] = narrow<X>(low * cos[i] - high * sin[i]);
      y[i + pairs] = narrow<X>(high * cos[i] + low * sin[i]);
    }
    std::copy(x + 2 * pairs, x + from.size[3], y + 2 * pairs);
  }
}

static void rotary(const Call& c, int64_t, int64_t task) {
  int64_t seq = c[0].size[1], pairs = c[3].size[0];
  const float *frequency = c[3].at<float>(), factor = c.number(0);
  Span tokens(task, TOKENS, c[0].size[0] * seq);
  std::vector<float> cos(pairs), sin(pairs);
  with_float(c[0], [&](auto type) {
    for (int64_t j = tokens.begin; j < tokens.end; j++) {
      float position = float(c[2].index(j / seq, j % seq));
      for (int64_t i = 0; i < pairs; i++) {
        cos[i] = std::cos(position * frequency[i]) * factor;
        sin[i] = std::sin(position * frequency[i]) * factor;
      }
      for (int which : {0, 1})
        turn<decltype(type)>(c[which], c[4 + which], j / seq, j % seq, cos.data(), sin.data(), pairs);
    }
  });
}

// kv_write(key_pool, value_pool [pages, page, hkv, hd], key, value [batch, seq, hkv, hd],
// index [batch, seq]) -> both pools in place
static int64_t write_tasks(const Call& c, int64_t phase) {
  return phase ? DONE : ceil_div(c[2].size[0] * c[2].size[1], TOKENS);
}

static void kv_write(const Call& c, int64_t, int64_t task) {
  int64_t seq = c[2].size[1], page = c[0].size[1];
  Span tokens(task, TOKENS, c[2].size[0] * seq);
  with_float(c[2], [&](auto from) {
    with_float(c[0], [&](auto to) {
      using X = decltype(from);
      using P = decltype(to);
      for (int64_t j = tokens.begin; j < tokens.end; j++) {
        int64_t at = c[4].index(j / seq, j % seq);
        for (int which : {0, 1})
          for (int64_t h = 0; h < c[2].size[2]; h++) {
            const X* x = c[2 + which].at<X>(j / seq, j % seq, h);
            P* y = c[which].at<P>(at / page, at % page, h);
            for (int64_t i = 0; i < c[2].size[3]; i++) y[i] = narrow<P>(wide(x[i]));
          }
      }
    });
  });
}

// attention(query [batch, seq, hq, hd], key_pool, value_pool [pages, page, hkv, hd], block_table
// [batch, max_pages], position [batch, seq], context [batch]; scale) -> out. A task answers some
// queries of a row for the heads that share a key head, page by page: the maximum so far scales what
// was summed before (arXiv:2205.14135).
static int64_t attention_tasks(const Call& c, int64_t phase) {
  const Tensor& query = c[0];
  return phase ? DONE : query.size[0] * c[1].size[2] * ceil_div(query.size[1], QUERIES);
}

struct Answer {  // to one query of one head, so far
  int64_t token, head, sees;
  float peak, total;
};

template <class X, class P>
static void attend(const Call& c, int64_t b, int64_t key_head, Span tokens) {
  const Tensor &query = c[0], &keys = c[1], &values = c[2], &table = c[3], &out = c[6];
  int64_t group = query.size[2] / keys.size[2], hd = query.size[3], page = keys.size[1];
  std::vector<Answer> answers;
  int64_t longest = 0, context = c[5].index(b);
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    int64_t position = c[4].index(b, t), sees = position < context ? position + 1 : 0;
    longest = std::max(longest, sees);
    for (int64_t h = 0; h < group; h++)
      answers.push_back({t, key_head * group + h, sees, -INFINITY, 0});
  }
  int64_t n = answers.size();
  std::vector<float> sums(n * hd, 0.0f), scores(n * page), scaled(n * hd);
  for (int64_t a = 0; a < n; a++)
    for (int64_t i = 0; i < hd; i++)
      scaled[a * hd + i] = wide(query.at<X>(b, answers[a].token, answers[a].head)[i]) * c.number(0);
  for (int64_t first = 0; first < longest; first += page) {
    int64_t number = table.index(b, first / page), count = std::min(page, longest - first);
    for (int64_t part = 0; part < count; part += ROW_BLOCK) {
      int64_t rows = std::min(ROW_BLOCK, count - part);
      product<P, float>(
          rows, n, hd, [&](int64_t i) { return keys.at<P>(number, part + i, key_head); },
          [&](int64_t j) { return scaled.data() + j * hd; },
          [&](int64_t j, const float* sums) { std::copy_n(sums, rows, &scores[j * page + part]); });
    }
    for (int64_t a = 0; a < n; a++) {
      int64_t seen = std::min(count, answers[a].sees - first);
      if (seen <= 0) continue;
      float *p = &scores[a * page], *sum = &sums[a * hd];
      float peak = std::max(answers[a].peak, *std::max_element(p, p + seen));
      float before = exponential(answers[a].peak - peak), total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < seen; i++) {
        p[i] = exponential(p[i] - peak);
        total += p[i];
      }
      answers[a].peak = peak, answers[a].total = answers[a].total * before + total;
      for (int64_t k = 0; k < hd; k++) sum[k] *= before;
      for (int64_t i = 0; i < seen; i++) {
        const P* v = values.at<P>(number, i, key_head);
        for (int64_t k = 0; k < hd; k++) sum[k] += p[i] * wide(v[k]);
      }
    }
  }
  for (int64_t a = 0; a < n; a++) {
    X* y = out.at<X>(b, answers[a].token, answers[a].head);
    float inverse = answers[a].total > 0 ? 1 / answers[a].total : 0;
    for (int64_t k = 0; k < hd; k++) y[k] = narrow<X>(sums[a * hd + k] * inverse);
  }
}

static void attention(const Call& c, int64_t, int64_t task) {
  int64_t heads = c[1].size[2], blocks = ceil_div(c[0].size[1], QUERIES), pair = task / blocks;
  with_float(c[0], [&](auto x) {
    with_float(c[1], [&](auto pool) {
      attend<decltype(x), decltype(pool)>(c, pair / heads, pair % heads,
                                          Span(task % blocks, QUERIES, c[0].size[1]));
    });
  });
}

extern const Kernel ATTENTION[] = {
    {"rotary", token_tasks, rotary},
    {"kv_write", write_tasks, kv_write},
    {"attention", attention_tasks, attention},
    {nullptr, nullptr, nullptr},
};

}  // namespace qnext
