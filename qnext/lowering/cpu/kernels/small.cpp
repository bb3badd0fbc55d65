// What lies around the layers: lengths, page numbers, rows of tables, tokens. Little work each, but
// every one that torch did would end a program and come back to Python.
#include <algorithm>

#include "kernel.h"

namespace qnext {

static const int64_t BYTES[] = {4, 2, 1, 4, 8, 1};  // of a number of each kind

static int64_t bytes(const Tensor& t) { return BYTES[t.kind]; }
static int64_t numbers(const Tensor& t) { return t.rows() * t.last(); }

// An integer or a bool, wherever it lies.
static int64_t whole(const Tensor& t, int64_t at) {
  if (t.kind == I64) return reinterpret_cast<const int64_t*>(t.data)[at];
  if (t.kind == I32) return reinterpret_cast<const int32_t*>(t.data)[at];
  return reinterpret_cast<const uint8_t*>(t.data)[at];
}

static void put(const Tensor& t, int64_t at, int64_t value) {
  if (t.kind == I64) reinterpret_cast<int64_t*>(t.data)[at] = value;
  if (t.kind == I32) reinterpret_cast<int32_t*>(t.data)[at] = int32_t(value);
  if (t.kind == BOOL) reinterpret_cast<uint8_t*>(t.data)[at] = value != 0;
}

// Where number i of y, in order, is read from t, whose missing axes and axes of one are repeated.
static int64_t spread(const Tensor& t, const Tensor& y, int64_t i) {
  int64_t at = 0, more = y.dims - t.dims;
  for (int64_t d = y.dims - 1; d >= more; d--) {
    if (t.size[d - more] != 1) at += i % y.size[d] * t.stride[d - more];
    i /= y.size[d];
  }
  return at;
}

static int64_t once(const Call&, int64_t) { return 1; }

enum Op : int64_t { ADD, SUB, MUL, FLOOR_DIVIDE, REMAINDER, MINIMUM, MAXIMUM, LT, LE, GT, GE, EQ, NE, AND, OR };

static int64_t floor_divide(int64_t a, int64_t b) {
  int64_t quotient = a / b;
  return quotient - (a % b != 0 && (a < 0) != (b < 0));
}

static int64_t apply(int64_t op, int64_t a, int64_t b) {
  switch (op) {
    case ADD: return a + b;
    case SUB: return a - b;
    case MUL: return a * b;
    case FLOOR_DIVIDE: return floor_divide(a, b);
    case REMAINDER: return a - floor_divide(a, b) * b;
    case MINIMUM: return a < b ? a : b;
    case MAXIMUM: return a > b ? a : b;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case EQ: return a == b;
    case NE: return a != b;
    case AND: return a & b;
    default: return a | b;
  }
}

// compute(a, b; op) -> y, each spread over the other's axes
static void compute(const Call& c, int64_t, int64_t) {
  const Tensor &a = c[0], &b = c[1], &y = c[2];
  for (int64_t i = 0, n = numbers(y); i < n; i++)
    put(y, i, apply(c.integer(0), whole(a, spread(a, y, i)), whole(b, spread(b, y, i))));
}

// choose(condition, x, other) -> y
static void choose(const Call& c, int64_t, int64_t) {
  const Tensor& y = c[3];
  for (int64_t i = 0, n = numbers(y); i < n; i++) {
    const Tensor& from = whole(c[0], spread(c[0], y, i)) ? c[1] : c[2];
    put(y, i, whole(from, spread(from, y, i)));
  }
}

// convert(x) -> y, of the dtype that y has
static void convert(const Call& c, int64_t, int64_t) {
  for (int64_t i = 0, n = numbers(c[1]); i < n; i++) put(c[1], i, whole(c[0], spread(c[0], c[1], i)));
}

// x seen as [outer, size of an axis, inner], in the order in which it is counted
struct Axis {
  int64_t outer = 1, size, inner = 1;
  Axis(const Tensor& x, int64_t axis) : size(x.size[axis]) {
    for (int64_t d = 0; d < axis; d++) outer *= x.size[d];
    for (int64_t d = axis + 1; d < x.dims; d++) inner *= x.size[d];
  }
};

// add_up(x; axis, running) -> y: the sum over an axis, or after each number of it
static void add_up(const Call& c, int64_t, int64_t) {
  const Tensor &x = c[0], &y = c[1];
  Axis axis(x, c.integer(0));
  for (int64_t o = 0; o < axis.outer; o++)
    for (int64_t i = 0; i < axis.inner; i++) {
      int64_t total = 0;
      for (int64_t k = 0; k < axis.size; k++) {
        int64_t at = (o * axis.size + k) * axis.inner + i;
        total += whole(x, spread(x, x, at));
        if (c.integer(1)) put(y, at, total);
      }
      if (!c.integer(1)) put(y, o * axis.inner + i, total);
    }
}

// largest(x [*batch, n]) -> index: the first of the greatest; a NaN is greater than all
static int64_t row_tasks(const Call& c, int64_t) { return c[0].rows(); }

static void largest(const Call& c, int64_t, int64_t row) {
  with_float(c[0], [&](auto type) {
    const auto* x = c[0].row<decltype(type)>(row);
    int64_t n = c[0].last(), best = 0;
    float peak = -INFINITY;
    bool ordered = true;
#pragma omp simd reduction(max : peak) reduction(& : ordered)
    for (int64_t i = 0; i < n; i++) {
      peak = wide(x[i]) > peak ? wide(x[i]) : peak;
      ordered &= wide(x[i]) == wide(x[i]);
    }
    auto wanted = [&](float number) { return ordered ? number == peak : number != number; };
    while (!wanted(wide(x[best]))) best++;
    put(c[1], row, best);
  });
}

// finite(x [*batch, n]) -> whether all of a row's numbers are
static void finite(const Call& c, int64_t, int64_t row) {
  with_float(c[0], [&](auto type) {
    const auto* x = c[0].row<decltype(type)>(row);
    bool good = true;
    for (int64_t i = 0; i < c[0].last(); i++) good &= std::isfinite(wide(x[i]));
    put(c[1], row, good);
  });
}

// Copies numbers of one row of tensors of one kind and as many numbers.
static void copy_row(const Tensor& from, int64_t at, const Tensor& to, int64_t place) {
  int64_t size = bytes(to), n = to.last(), step = from.stride[from.dims - 1], onward = to.stride[to.dims - 1];
  const char* source = from.data + at * size;
  char* target = to.data + place * size;
  if ((step == 1 && onward == 1) || n == 1) {
    std::memcpy(target, source, n * size);
  } else {
    for (int64_t i = 0; i < n; i++) std::memcpy(target + i * onward * size, source + i * step * size, size);
  }
}

constexpr int64_t COPIED = 1 << 14;  // bytes of a task, or one row

static int64_t rows_a_task(const Tensor& y) {
  int64_t rows = COPIED / (y.last() * bytes(y) + 1);
  return rows > 1 ? rows : 1;
}
static int64_t copy_tasks(const Tensor& y) { return ceil_div(y.rows(), rows_a_task(y)); }
template <class F> static void each_row(const Tensor& y, int64_t task, F f) {
  Span rows(task, rows_a_task(y), y.rows());
  for (int64_t r = rows.begin; r < rows.end; r++) f(r);
}

// copy(x) -> y, together
static int64_t clone_tasks(const Call& c, int64_t) { return copy_tasks(c[1]); }
static void clone(const Call& c, int64_t, int64_t task) {
  each_row(c[1], task, [&](int64_t r) { copy_row(c[0], c[0].place(r), c[1], c[1].place(r)); });
}

// write_back(into, values): the memory of `into` holds them
static int64_t write_back_tasks(const Call& c, int64_t) { return copy_tasks(c[0]); }
static void write_back(const Call& c, int64_t, int64_t task) {
  each_row(c[0], task, [&](int64_t r) { copy_row(c[1], c[1].place(r), c[0], c[0].place(r)); });
}

// join(a, b; axis) -> y: those of a, then those of b, along an axis
static Tensor part(const Tensor& y, const Tensor& like, int64_t axis, int64_t begin) {
  Tensor some = y;
  some.size[axis] = like.size[axis];
  some.data += begin * y.stride[axis] * bytes(y);
  return some;
}
static int64_t joined_a_task(const Call& c) { return std::min(rows_a_task(c[0]), rows_a_task(c[1])); }
static int64_t join_tasks(const Call& c, int64_t) {
  return ceil_div(c[0].rows() + c[1].rows(), joined_a_task(c));
}
static void join(const Call& c, int64_t, int64_t task) {
  int64_t axis = c.integer(0), first = c[0].rows();
  Tensor to[] = {part(c[2], c[0], axis, 0), part(c[2], c[1], axis, c[0].size[axis])};
  Span rows(task, joined_a_task(c), first + c[1].rows());
  for (int64_t r = rows.begin; r < rows.end; r++) {
    int which = r >= first;
    int64_t row = which ? r - first : r;
    copy_row(c[which], c[which].place(row), to[which], to[which].place(row));
  }
}

// rows(x [n, d], index [*batch]) -> y [*batch, d]
static int64_t rows_tasks(const Call& c, int64_t) { return copy_tasks(c[2]); }
static void rows(const Call& c, int64_t, int64_t task) {
  each_row(c[2], task, [&](int64_t r) {
    int64_t at = 0, left = r;  // r in order, over the axes of the index
    for (int64_t d = c[1].dims - 1; d >= 0; d--) {
      at += left % c[1].size[d] * c[1].stride[d];
      left /= c[1].size[d];
    }
    int64_t from = whole(c[1], at);
    if (c.within(from, c[0].size[0])) copy_row(c[0], from * c[0].stride[0], c[2], c[2].place(r));
  });
}

// pick(x, index; axis) -> y: number index[.., i, ..] of an axis of x; the index is spread over the
// other axes, and where it is over the last one it picks whole rows
static int64_t pick_tasks(const Call& c, int64_t) { return copy_tasks(c[2]); }
static void pick(const Call& c, int64_t, int64_t task) {
  const Tensor &x = c[0], &index = c[1], &y = c[2];
  int64_t axis = c.integer(0), size = bytes(y), last = y.dims - 1;
  bool spread_last = axis != last && index.size[last] == 1 && x.stride[last] == 1;
  int64_t together = spread_last ? y.last() : 1;
  each_row(y, task, [&](int64_t r) {
    for (int64_t i = 0; i < y.last(); i += together) {
      int64_t number = r * y.last() + i, at = 0, left = number;
      for (int64_t d = y.dims - 1; d >= 0; d--) {
        if (d != axis) at += left % y.size[d] * x.stride[d];
        left /= y.size[d];
      }
      int64_t from = whole(index, spread(index, y, number));
      if (!c.within(from, x.size[axis])) return;
      std::memcpy(y.data + number * size, x.data + (at + from * x.stride[axis]) * size, together * size);
    }
  });
}

// put_rows(pool [n, *rest], index [m], values [m, *rest]): rows of the pool, the last of those with
// one index counts
static void put_rows(const Call& c, int64_t, int64_t) {
  const Tensor &pool = c[0], &values = c[2];
  int64_t each = values.rows() / values.size[0];
  for (int64_t r = 0; r < values.rows(); r++) {
    int64_t to = c[1].index(r / each);
    if (!c.within(to, pool.size[0])) return;
    copy_row(values, values.place(r), pool, pool.place(to * each + r % each));
  }
}

extern const Kernel SMALL[] = {
    {"compute", 1, once, compute},
    {"choose", 1, once, choose},
    {"convert", 1, once, convert},
    {"add_up", 1, once, add_up},
    {"largest", 1, row_tasks, largest},
    {"finite", 1, row_tasks, finite},
    {"copy", 1, clone_tasks, clone},
    {"write_back", 1, write_back_tasks, write_back},
    {"join", 1, join_tasks, join},
    {"rows", 1, rows_tasks, rows},
    {"pick", 1, pick_tasks, pick},
    {"put_rows", 1, once, put_rows},
    {nullptr, 0, nullptr, nullptr},
};

}  // namespace qnext
