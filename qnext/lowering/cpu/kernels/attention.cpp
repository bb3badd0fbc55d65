// Grouped-query attention over pages: rotary embedding, the write of keys and values, attention.
#include <algorithm>
#include <vector>

#include "product.h"

namespace qnext {

constexpr int64_t TOKENS = 4;   // that one task turns or writes
constexpr int64_t QUERIES = 8;  // of a row, that one task answers
constexpr int SUMS = LANES == 8 ? 8 : 16;  // vectors of answers that are held in registers

// rotary(query [batch, seq, hq, hd], key [batch, seq, hkv, hd], position [batch, seq],
// frequency [pairs]; factor) -> (query, key)
static int64_t token_tasks(const Call& c, int64_t) {
  const Tensor& x = c[0];
  return ceil_div(x.size[0] * x.size[1], TOKENS);
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
static int64_t write_tasks(const Call& c, int64_t) {
  return ceil_div(c[2].size[0] * c[2].size[1], TOKENS);
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
static int64_t attention_tasks(const Call& c, int64_t) {
  const Tensor& query = c[0];
  return query.size[0] * c[1].size[2] * ceil_div(query.size[1], QUERIES);
}

struct Answer {  // to one query of one head, so far
  int64_t token, head, sees;
  float peak, total;
  float before;  // scales what was summed before this page; 1 where it has seen nothing
  int64_t seen;  // of this page's keys
};

// What one answer gives the keys of a page, from its scores: p[i] = exp(score - peak).
static void give_weights(Answer& answer, float* p) {
  if (answer.seen == 0) {
    answer.before = 1;
    return;
  }
  float peak = answer.peak, total = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t i = 0; i < answer.seen; i++) peak = p[i] > peak ? p[i] : peak;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < answer.seen; i++) {
    p[i] = exponential(p[i] - peak);
    total += p[i];
  }
  answer.before = exponential(answer.peak - peak);
  answer.peak = peak, answer.total = answer.total * answer.before + total;
}

// The values of one head in a page.
template <class P> struct Values {
  const P* first;
  int64_t apart;
  const P* operator[](int64_t i) const { return first + i * apart; }
};

// sum[a] = before[a] * sum[a] + p[a][i] * value[i] over the keys that answer a has seen, in their
// order, for N answers and V vectors of the head from the k-th number on. Sums stay in registers
// for the keys that all N have seen.
template <int N, int V, class P>
inline void add_values(const Answer* answers, const float* p, int64_t page, Values<P> value, float* sum,
                       int64_t hd, int64_t k) {
  Floats sums[N][V];
  int64_t common = answers[0].seen;
  sum += k;
#pragma GCC unroll 16
  for (int a = 0; a < N; a++) {
    common = std::min(common, answers[a].seen);
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sums[a][v] = load(sum + a * hd + v * LANES) * answers[a].before;
  }
  for (int64_t i = 0; i < common; i++) {
    Floats values[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) hold(values[v] = load(value[i] + k + v * LANES));
#pragma GCC unroll 16
    for (int a = 0; a < N; a++)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sums[a][v] = fused(splat(p[a * page + i]), values[v], sums[a][v]);
  }
#pragma GCC unroll 16
  for (int a = 0; a < N; a++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) store(sum + a * hd + v * LANES, sums[a][v]);
  for (int a = 0; a < N; a++)
    for (int64_t i = common; i < answers[a].seen; i++)
      for (int v = 0; v < V; v++) {
        float* at = sum + a * hd + v * LANES;
        store(at, fused(splat(p[a * page + i]), load(value[i] + k + v * LANES), load(at)));
      }
}

// The same for all numbers of a head, from the k-th on: V vectors at a time, then fewer.
template <int N, int V, class P>
inline void add_heads(const Answer* answers, const float* p, int64_t page, Values<P> value, float* sum,
                      int64_t hd, int64_t k = 0) {
  for (; k + V * LANES <= hd; k += V * LANES) add_values<N, V>(answers, p, page, value, sum, hd, k);
  if constexpr (V > 1) {
    add_heads<N, V - 1>(answers, p, page, value, sum, hd, k);
  } else {
    for (; k < hd; k++)
      for (int a = 0; a < N; a++) {
        float total = sum[a * hd + k] * answers[a].before;
        for (int64_t i = 0; i < answers[a].seen; i++)
          total = fused(p[a * page + i], wide(value[i][k]), total);
        sum[a * hd + k] = total;
      }
  }
}

// The same for all of n answers, as many at a time as fill the registers with their sums.
template <int N, class P>
[[gnu::noinline]] void add_all(const Answer* answers, const float* p, int64_t page, Values<P> value,
                               float* sum, int64_t hd, int64_t n) {
  constexpr int vectors = SUMS / N < 4 ? SUMS / N : 4;
  int64_t a = 0;
  for (; a + N <= n; a += N)
    add_heads<N, vectors>(answers + a, p + a * page, page, value, sum + a * hd, hd);
  if constexpr (N > 1)
    add_all<N / 2>(answers + a, p + a * page, page, value, sum + a * hd, hd, n - a);
}

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
      answers.push_back({t, key_head * group + h, sees, -INFINITY, 0, 0, 0});
  }
  int64_t n = answers.size();
  std::vector<float> sums(n * hd, 0.0f), scores(n * page), scaled(n * hd);
  for (int64_t a = 0; a < n; a++)
    for (int64_t i = 0; i < hd; i++)
      scaled[a * hd + i] = wide(query.at<X>(b, answers[a].token, answers[a].head)[i]) * c.number(0);
  for (int64_t first = 0; first < longest; first += page) {
    int64_t number = table.index(b, first / page), count = std::min(page, longest - first);
    int64_t next = first + page < longest ? table.index(b, first / page + 1) : number;
    Values<P> value{values.at<P>(number, 0, key_head), values.stride[1]};
    auto key = [&](int64_t i) {  // what is read after it is asked for
      fetch(value[i], hd);
      if (next != number) fetch(keys.at<P>(next, i, key_head), hd);
      return keys.at<P>(number, i, key_head);
    };
    for (int64_t part = 0; part < count; part += ROW_BLOCK) {
      int64_t rows = std::min(ROW_BLOCK, count - part);
      product<P, float>(
          rows, n, hd, [&](int64_t i) { return key(part + i); },
          [&](int64_t j) { return scaled.data() + j * hd; },
          [&](int64_t j, const float* sums) { std::copy_n(sums, rows, &scores[j * page + part]); });
    }
    for (int64_t a = 0; a < n; a++) {
      answers[a].seen = std::max<int64_t>(std::min(count, answers[a].sees - first), 0);
      give_weights(answers[a], &scores[a * page]);
    }
    add_all<SUMS / 2>(answers.data(), scores.data(), page, value, sums.data(), hd, n);
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
    {"rotary", 1, token_tasks, rotary},
    {"kv_write", 1, write_tasks, kv_write},
    {"attention", 1, attention_tasks, attention},
    {nullptr, 0, nullptr, nullptr},
};

}  // namespace qnext
