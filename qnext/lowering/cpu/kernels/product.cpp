// Tiles of rows and tokens, for every pair of types of weights and tokens that kernels multiply.
#include "product.h"

namespace qnext {

// The sums of R rows and T tokens from the j-th on.
template <int R, int T, class W, class X>
inline void one_tile(const W* const* w, Block<W, X>& x, int64_t n, int64_t i, int64_t apart, int64_t j) {
  bool stream = j == 0;  // later tokens find them in the nearest cache
  typename Product<W>::type out[R][T];
  if constexpr (sizeof(W) == 1) {
    int8_dots<R, T>(w, x.token + j, n, out, stream);
  } else {
    dots<R, T>(w, x.token + j, n, out, stream);
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) {
      if constexpr (sizeof(W) == 1) out[r][t] -= x.excess[j + t];
      x.sums[j + t][i + r * apart] = out[r][t];
    }
}

template <int R, class W, class X>
void against(const W* const* w, Block<W, X>& x, int64_t n, int64_t i, int64_t apart) {
  int64_t j = 0;
  for (; j + TILE_TOKENS <= x.count; j += TILE_TOKENS)
    one_tile<R, TILE_TOKENS>(w, x, n, i, apart, j);
  for (; j + 2 <= x.count; j += 2) one_tile<R, 2>(w, x, n, i, apart, j);
  for (; j < x.count; j++) one_tile<R, 1>(w, x, n, i, apart, j);
}

template void against<1>(const float* const*, Block<float, float>&, int64_t, int64_t, int64_t);
template void against<1>(const bf16* const*, Block<bf16, bf16>&, int64_t, int64_t, int64_t);
template void against<1>(const bf16* const*, Block<bf16, float>&, int64_t, int64_t, int64_t);
template void against<1>(const int8_t* const*, Block<int8_t, int8_t>&, int64_t, int64_t, int64_t);
template void against<TILE_ROWS>(const float* const*, Block<float, float>&, int64_t, int64_t, int64_t);
template void against<TILE_ROWS>(const bf16* const*, Block<bf16, bf16>&, int64_t, int64_t, int64_t);
template void against<TILE_ROWS>(const bf16* const*, Block<bf16, float>&, int64_t, int64_t, int64_t);
template void against<TILE_ROWS>(const int8_t* const*, Block<int8_t, int8_t>&, int64_t, int64_t,
                                 int64_t);

}  // namespace qnext
