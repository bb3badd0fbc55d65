// The recurrence of a delta-net layer: short convolution, gates, gated delta rule.
#include <algorithm>
#include <vector>

#include "vector.h"

namespace qnext {

template <int N> using Number = std::integral_constant<int, N>;  // of rows, to choose code by

constexpr int64_t CHANNELS = 256;  // of the convolution, that one task takes, or a multiple
constexpr int64_t STATE_ROWS = 64;  // of a head's state, that one task carries through time

// short_conv(x [batch, seq, conv], weight [conv, width], window [rows, window, conv], rows, offset,
// start [batch]) -> y, window in place
static int64_t channels_a_task(const Call& c) {
  int64_t each = c[0].rows() * c[1].size[1];  // products of a channel
  return ceil_div(ceil_div(PRODUCTS, each > 0 ? each : 1), CHANNELS) * CHANNELS;
}
static int64_t conv_tasks(const Call& c, int64_t) { return ceil_div(c[0].size[2], channels_a_task(c)); }

template <class X>
static void conv_row(const Call& c, int64_t b, Span channels, const std::vector<float>& taps_first) {
  const Tensor &x = c[0], &window = c[2], &y = c[6];
  int64_t seq = x.size[1], taps = c[1].size[1], kept = window.size[1], past = taps - 1;
  int64_t row = c[3].index(b), offset = c[4].index(b), start = c[5].index(b);
  int64_t first = channels.begin, n = channels.end - first;
  // the line of inputs is the window's last ones, copied here as the window is overwritten, and x
  std::vector<X> before(past * n);
  for (int64_t i = 0; i < past; i++)
    std::copy_n(window.at<X>(row, offset + i) + first, n, before.data() + i * n);
  auto line = [&](int64_t i) -> const X* {
    return i < past ? before.data() + i * n : x.at<X>(b, i - past) + first;
  };
  std::vector<float> sums(n);
  int64_t whole = n - n % LANES;
  for (int64_t t = 0; t < seq; t++) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t k = 0; k < taps; k++) {
      const X* input = line(t + k);
      const float* tap = &taps_first[k * n];
      for (int64_t i = 0; i < whole; i += LANES)
        store(&sums[i], fused(load(input + i), load(tap + i), load(&sums[i])));
      for (int64_t i = whole; i < n; i++) sums[i] = fused(wide(input[i]), tap[i], sums[i]);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) sums[i] = silu(sums[i]);
    X* out = y.at<X>(b, t) + first;
    for (int64_t i = 0; i < whole; i += LANES) store(out + i, load(&sums[i]));
    for (int64_t i = whole; i < n; i++) out[i] = narrow<X>(sums[i]);
  }
  for (int64_t i = 0; i < kept; i++) {
    X* out = window.at<X>(row, i) + first;
    if (start + i < past + seq) {
      std::copy_n(line(start + i), n, out);
    } else {
      std::fill_n(out, n, X{});
    }
  }
}

// The weights of n channels, tap by tap.
template <class W>
static std::vector<float> transposed(const Tensor& weight, int64_t first, int64_t n) {
  int64_t taps = weight.size[1], i = 0;
  std::vector<float> taps_first(taps * n);
  if (taps == 4 && weight.stride[0] == 4) {
    for (; i + LANES <= n; i += LANES) {
      Floats of[4], parts[4], tap[4];  // of LANES / 4 channels each; taps 0 and 2, then 1 and 3; each tap
      for (int k = 0; k < 4; k++) of[k] = load(weight.at<W>(first + i) + k * LANES);
      for (int k = 0; k < 2; k++) split(of[2 * k], of[2 * k + 1], parts[k], parts[2 + k]);
      for (int k = 0; k < 2; k++) split(parts[2 * k], parts[2 * k + 1], tap[k], tap[2 + k]);
      for (int k = 0; k < 4; k++) store(&taps_first[k * n + i], tap[k]);
    }
  }
  for (; i < n; i++)
    for (int64_t k = 0; k < taps; k++) taps_first[k * n + i] = wide(weight.at<W>(first + i)[k]);
  return taps_first;
}

static void short_conv(const Call& c, int64_t, int64_t task) {
  const Tensor &x = c[0], &weight = c[1];
  Span channels(task, channels_a_task(c), x.size[2]);
  std::vector<float> taps_first;
  with_float(weight, [&](auto type) {
    taps_first = transposed<decltype(type)>(weight, channels.begin, channels.size());
  });
  with_float(x, [&](auto type) {
    for (int64_t b = 0; b < x.size[0]; b++) conv_row<decltype(type)>(c, b, channels, taps_first);
  });
}

// delta_gates(a, b [batch, seq, hv], A_log, dt_bias [hv], valid [batch, seq]) -> (g, beta)
static int64_t gate_tasks(const Call& c, int64_t) { return ceil_div(c[0].rows(), 8); }

static float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

static void delta_gates(const Call& c, int64_t, int64_t task) {
  const Tensor &valid = c[4], &g = c[5], &beta = c[6];
  const float *A_log = c[2].at<float>(), *dt_bias = c[3].at<float>();
  Span rows(task, 8, c[0].rows());
  with_float(c[0], [&](auto type) {
    using X = decltype(type);
    for (int64_t r = rows.begin; r < rows.end; r++) {
      bool real = valid.at<bool>(r / valid.size[1])[r % valid.size[1] * valid.stride[1]];
      const X *a = c[0].row<X>(r), *b = c[1].row<X>(r);
      for (int64_t h = 0; h < c[0].last(); h++) {
        float decay = -std::exp(A_log[h]) * softplus(wide(a[h]) + dt_bias[h]);
        g.row<float>(r)[h] = real ? decay : 0;
        beta.row<X>(r)[h] = narrow<X>(real ? sigmoid(wide(b[h])) : 0);
      }
    }
  });
}

// delta_rule(query, key [batch, seq, hk, dk], value [batch, seq, hv, dv], g, beta [batch, seq, hv],
// state [slots, hv, dv, dk], slots [batch, writes]; scale) -> out, state in place. A row of a state
// meets the others nowhere: a task takes a few of them through all tokens.
static int64_t rule_tasks(const Call& c, int64_t) {
  const Tensor& value = c[2];
  return value.size[0] * value.size[2] * ceil_div(value.size[3], STATE_ROWS);
}

// Rows of a state in memory, `apart` from each other.
template <class T> struct Rows {
  T* first;
  int64_t apart;
  T* operator[](int64_t i) const { return first + i * apart; }
};

// One token for N rows of a state from the i-th on, which may be written elsewhere than they are
// read. What is read, s . k of each, is all that a row's write waits for: rows are read together,
// then written and asked together. Rows of the first token come from memory, and from so many places
// at once that the machine does not see what comes next: the N rows after these are asked for while
// these are written (measured: 26 to 30 GB/s read and written, not 24).
template <int N, class From, class To>
[[gnu::noinline]] void rule_step(Rows<From> from, Rows<To> to, int64_t i, const float* k,
                                 const float* q, int64_t n, float decay, float beta, const float* v,
                                 float* out, bool first) {
  const float* keys[1] = {k};
  const From* rows[N];
  float read[N][1], write[N];
  for (int r = 0; r < N; r++) rows[r] = from[i + r];
  dots<N, 1>(rows, keys, n, read);
  for (int r = 0; r < N; r++) write[r] = beta * (v[i + r] - decay * read[r][0]);
  Floats sums[N];
  int64_t whole = n - n % LANES;
  for (int r = 0; r < N; r++) {
    To* row = to[i + r];
    Floats total = {}, written = splat(write[r]);
    if (first) fetch(from[i + r + N], n);
    for (int64_t j = 0; j < whole; j += LANES) {
      Floats next = fused(written, load(k + j), decay * load(rows[r] + j));
      store(row + j, next);
      total = fused(next, load(q + j), total);
    }
    sums[r] = total;
  }
  sum_each<N>(sums, out + i);
  for (int r = 0; r < N; r++)
    for (int64_t j = whole; j < n; j++) {
      float number = fused(write[r], k[j], decay * wide(rows[r][j]));
      to[i + r][j] = narrow<To>(number);
      out[i + r] = fused(number, q[j], out[i + r]);
    }
}

// What one token brings to rows of a head's state, widened.
struct Token {
  std::vector<float> q, k, v, out;
  float decay, beta;

  Token(int64_t dk, int64_t rows) : q(dk), k(dk), v(rows), out(rows) {}
  template <class From, class To> void step(Rows<From> from, Rows<To> to, bool first) {
    int64_t i = 0, n = v.size();
    auto some = [&](auto rows) {
      rule_step<rows>(from, to, i, k.data(), q.data(), k.size(), decay, beta, v.data(), out.data(), first);
      i += rows;
    };
    while (i + 16 <= n) some(Number<16>());
    if (i + 8 <= n) some(Number<8>());
    if (i + 4 <= n) some(Number<4>());
    while (i < n) some(Number<1>());
  }
};

template <class X, class S>
static void rule_part(const Call& c, int64_t b, int64_t head, Span rows) {
  const Tensor &query = c[0], &key = c[1], &value = c[2], &g = c[3], &beta = c[4], &state = c[5],
               &slots = c[6], &out = c[7];
  int64_t seq = value.size[1], dk = key.size[3], n = rows.end - rows.begin;
  int64_t source = head / (value.size[2] / key.size[2]), writes = slots.size[1];
  // the state's rows after token t; each token has a slot of its own, or all have one
  auto after = [&](int64_t t) {
    return Rows<S>{state.at<S>(slots.index(b, writes > 1 ? t : 0), head, rows.begin), state.stride[2]};
  };
  // A narrow state is carried from token to token as float32, and rounded where it is kept.
  constexpr bool NARROW = sizeof(S) < sizeof(float);
  std::vector<float> carried(NARROW && seq > 1 ? n * dk : 0);
  Rows<float> between{carried.data(), dk};
  auto keep = [&](Rows<S> to) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < dk; j++) to[i][j] = narrow<S>(between[i][j]);
  };
  Token token(dk, n);
  for (int64_t t = 0; t < seq; t++) {
    for (int64_t j = 0; j < dk; j++) {
      token.q[j] = wide(query.at<X>(b, t, source)[j]) * c.number(0);
      token.k[j] = wide(key.at<X>(b, t, source)[j]);
    }
    for (int64_t i = 0; i < n; i++) token.v[i] = wide(value.at<X>(b, t, head)[rows.begin + i]);
    token.decay = std::exp(g.at<float>(b, t)[head]), token.beta = wide(beta.at<X>(b, t)[head]);
    bool first = t == 0, last = t + 1 == seq;
    if (!NARROW || (first && last)) {
      token.step(after(first ? 0 : t - 1), after(t), first);
    } else if (first) {
      token.step(after(0), between, first);
    } else if (last) {
      token.step(between, after(t), first);
    } else {
      token.step(between, between, first);
    }
    if (NARROW && writes > 1 && !last) keep(after(t));
    for (int64_t i = 0; i < n; i++) out.at<X>(b, t, head)[rows.begin + i] = narrow<X>(token.out[i]);
  }
}

static void delta_rule(const Call& c, int64_t, int64_t task) {
  const Tensor& value = c[2];
  int64_t heads = value.size[2], parts = ceil_div(value.size[3], STATE_ROWS), pair = task / parts;
  with_float(value, [&](auto x) {
    with_float(c[5], [&](auto state) {
      rule_part<decltype(x), decltype(state)>(c, pair / heads, pair % heads,
                                              Span(task % parts, STATE_ROWS, value.size[3]));
    });
  });
}

extern const Kernel DELTA_NET[] = {
    {"short_conv", 1, conv_tasks, short_conv},
    {"delta_gates", 1, gate_tasks, delta_gates},
    {"delta_rule", 1, rule_tasks, delta_rule},
    {nullptr, 0, nullptr, nullptr},
};

}  // namespace qnext
