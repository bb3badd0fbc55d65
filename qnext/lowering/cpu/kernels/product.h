// Rows of weights times tokens, in tiles. Where weights and tokens come from and what becomes of
// products is the caller's: `row(i)` and `token(j)` give pointers, `take(j, sums)` is told a token's.
#pragma once

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

// The sums of R rows `apart` from the i-th on, and T tokens from the j-th on.
template <int R, int T, class W, class X>
inline void one_tile(const W* const* w, Block<W, X>& x, int64_t n, int64_t i, int64_t apart, int64_t j) {
  typename Product<W>::type out[R][T];
  if constexpr (sizeof(W) == 1) {
    int8_dots<R, T>(w, x.token + j, n, out);
  } else {
    dots<R, T>(w, x.token + j, n, out);
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) {
      if constexpr (sizeof(W) == 1) out[r][t] -= x.excess[j + t];
      x.sums[j + t][i + r * apart] = out[r][t];
    }
}

// All tokens of a block against R rows of weights, which stay in the nearest cache.
template <int R, class W, class X, class Row>
inline void against(Row row, Block<W, X>& x, int64_t n, int64_t i, int64_t apart) {
  const W* w[R];
  for (int r = 0; r < R; r++) w[r] = row(i + r * apart);
  int64_t j = 0;
  for (; j + TILE_TOKENS <= x.count; j += TILE_TOKENS)
    one_tile<R, TILE_TOKENS>(w, x, n, i, apart, j);
  for (; j + 2 <= x.count; j += 2) one_tile<R, 2>(w, x, n, i, apart, j);
  for (; j < x.count; j++) one_tile<R, 1>(w, x, n, i, apart, j);
}

// Calls take(j, sums) for tokens 0 .. count, with sums[i] = row(i) . token(j) for up to ROW_BLOCK
// rows of n elements. A tile's rows are a quarter of them apart, so that over time each is one long
// stream from memory: rows side by side share pages, which prefetchers take for noise (measured:
// 31 GB/s, not 19).
template <class W, class X, class Row, class Token, class Take>
void product(int64_t rows, int64_t count, int64_t n, Row row, Token token, Take take) {
  int64_t apart = rows / TILE_ROWS;
  Block<W, X> x;
  for (int64_t first = 0; first < count; first += TOKEN_BLOCK) {
    x.count = count - first < TOKEN_BLOCK ? count - first : TOKEN_BLOCK;
    for (int64_t j = 0; j < x.count; j++)
      x.token[j] = token(first + j), x.excess[j] = excess_of(x.token[j], n);
    for (int64_t i = 0; i < apart; i++) against<TILE_ROWS>(row, x, n, i, apart);
    for (int64_t i = apart * TILE_ROWS; i < rows; i++) against<1>(row, x, n, i, 0);
    for (int64_t j = 0; j < x.count; j++) take(first + j, x.sums[j]);
  }
}

}  // namespace qnext
