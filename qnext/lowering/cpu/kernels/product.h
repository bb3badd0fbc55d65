// Rows of weights times tokens, in tiles. Where weights and tokens come from and what becomes of
// products is the caller's: `row(i)` and `token(j)` give pointers, `take(j, sums)` is told a token's.
#pragma once

#include <vector>

#include "int8.h"
#include "vector.h"

namespace qnext {

// A tile's sums are held in registers: 16 of them where there are 32 registers, else 8.
constexpr int TILE_ROWS = 4, TILE_TOKENS = LANES == 8 ? 2 : 4;
// Tokens and rows whose products are collected, to be taken token by token in one piece: stores of
// single numbers to as many places as there are tokens would meet in one set of a cache.
constexpr int64_t TOKEN_BLOCK = 64, ROW_BLOCK = 64;

template <class W> struct Product {
  using type = float;
};
template <> struct Product<int8_t> {
  using type = int32_t;
};

template <class X> inline int32_t excess_of(const X*, int64_t) { return 0; }
template <> inline int32_t excess_of(const int8_t* x, int64_t n) { return excess(x, n); }

template <class W, class X> struct Block {  // of tokens
  const X* token[TOKEN_BLOCK];
  int32_t excess[TOKEN_BLOCK];  // of int8 sums
  typename Product<W>::type sums[TOKEN_BLOCK][ROW_BLOCK];
  int64_t count;
};

// x.sums[j][i + r apart] = w[r] . x.token[j], for R rows and all tokens of a block; the rows stay in
// the nearest cache. Compiled once, in product.cpp, as it is most of what there is to compile.
template <int R, class W, class X>
void against(const W* const* w, Block<W, X>& x, int64_t n, int64_t i, int64_t apart);

// Weights of bfloat16 that no instruction multiplies as they are are widened for each tile: with
// that many tokens or more once for all of them. Products and sums are the same, bit by bit.
constexpr int64_t WIDENED = 4;
template <class W, class X> constexpr bool widens() {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  return sizeof(W) == 2 && sizeof(X) == 4;
#else
  return sizeof(W) == 2;
#endif
}
template <class T> inline const float* widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = wide(from[i]);
  return to;
}

// A block of tokens with all rows; `row(i, at)` and `token(j, at)` may leave theirs at `at`, the
// place of one of a tile's rows or of a block's tokens.
template <class W, class X, class Row, class Token, class Take>
void product_of(int64_t rows, int64_t count, int64_t n, Row row, Token token, Take take) {
  int64_t apart = rows / TILE_ROWS;
  Block<W, X> x;
  for (int64_t first = 0; first < count; first += TOKEN_BLOCK) {
    x.count = count - first < TOKEN_BLOCK ? count - first : TOKEN_BLOCK;
    for (int64_t j = 0; j < x.count; j++)
      x.token[j] = token(first + j, j), x.excess[j] = excess_of(x.token[j], n);
    for (int64_t i = 0; i < apart; i++) {
      const W* some[TILE_ROWS];
      for (int r = 0; r < TILE_ROWS; r++) some[r] = row(i + r * apart, r);
      against<TILE_ROWS>(some, x, n, i, apart);
    }
    for (int64_t i = apart * TILE_ROWS; i < rows; i++) {
      const W* one[1] = {row(i, 0)};
      against<1>(one, x, n, i, 0);
    }
    for (int64_t j = 0; j < x.count; j++) take(first + j, x.sums[j]);
  }
}

// Calls take(j, sums) for tokens 0 .. count, with sums[i] = row(i) . token(j) for up to ROW_BLOCK
// rows of n elements. A tile's rows are a quarter of them apart, so that over time each is one long
// stream from memory: rows side by side share pages, which prefetchers take for noise (measured:
// 31 GB/s, not 19).
template <class W, class X, class Row, class Token, class Take>
void product(int64_t rows, int64_t count, int64_t n, Row row, Token token, Take take) {
  if constexpr (widens<W, X>()) {
    if (count >= WIDENED) {
      std::vector<float> w(TILE_ROWS * n), x((count < TOKEN_BLOCK ? count : TOKEN_BLOCK) * n);
      return product_of<float, float>(
          rows, count, n, [&](int64_t i, int64_t at) { return widen(row(i), n, &w[at * n]); },
          [&](int64_t j, int64_t at) { return widen(token(j), n, &x[at * n]); }, take);
    }
  }
  product_of<W, X>(
      rows, count, n, [&](int64_t i, int64_t) { return row(i); },
      [&](int64_t j, int64_t) { return token(j); }, take);
}

}  // namespace qnext
