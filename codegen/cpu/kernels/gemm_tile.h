// The innermost kernel: a few rows of x times one panel of weights over one block of k.
#pragma once
#include <utility>

#include "gemm_lanes.h"

namespace llm42::gemm {

// Passes over the panel that a tile of `rows` rows takes: as many registers at once as leave kRows * 3
// accumulators.
inline constexpr int passes(int rows) { return rows * kVecs <= 3 * kRows ? 1 : 2; }

// Weights to fetch while a tile is computed: from `next` on, `step` bytes for every k, into L1 (near) or
// L2. L1 is better when every weight is used by several tiles: then there is time to fill it. When memory
// is the bottleneck, requests of L1 only get into each other's way.
struct Prefetch {
  const char* next;
  int64_t step;
};

template <bool kNear>
inline void prefetch(const char* p) {
  __builtin_prefetch(p, 0, kNear ? 3 : 2);
}

// kR rows of x times registers kV0..kV0+kN-1 of a panel. x: rows lda apart; w: [kc, kPanel];
// c: [kR, kPanel] partial sums, continued from if `resume`.
template <int kR, int kV0, int kN, bool kNear, class T>
inline void tile(const float* x, int64_t lda, const T* w, int64_t kc, float* c, bool resume, Prefetch fetch) {
  Vec acc[kR][kN];
#pragma GCC unroll 8
  for (int r = 0; r < kR; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kN; v++) acc[r][v] = resume ? Vec::load(c + r * kPanel + (kV0 + v) * kLanes) : Vec::zero();
  // Not unrolled: the body has enough chains, and longer bodies make compilers spill accumulators.
#pragma GCC unroll 1
  for (int64_t k = 0; k < kc; k++) {
    prefetch<kNear>(fetch.next);
    if constexpr (kN == kVecs) prefetch<kNear>(fetch.next + fetch.step / 2);
    fetch.next += fetch.step;
    const T* row = w + k * kPanel;
    Vec a[kR];
    if constexpr (kR < kN) {
#pragma GCC unroll 8
      for (int r = 0; r < kR; r++) a[r] = Vec::set1(x[r * lda + k]);
      [&]<int... V>(std::integer_sequence<int, V...>) {
        const auto column = [&](int v, Vec b) {
#pragma GCC unroll 8
          for (int r = 0; r < kR; r++) acc[r][v] = fma(a[r], b, acc[r][v]);
        };
        (column(V, decode<kV0 + V>(row)), ...);
      }(std::make_integer_sequence<int, kN>{});
    } else {
      Vec b[kN];
      [&]<int... V>(std::integer_sequence<int, V...>) {
        ((b[V] = decode<kV0 + V>(row)), ...);
      }(std::make_integer_sequence<int, kN>{});
#pragma GCC unroll 8
      for (int r = 0; r < kR; r++) {
        const Vec a = Vec::set1(x[r * lda + k]);
#pragma GCC unroll 8
        for (int v = 0; v < kN; v++) acc[r][v] = fma(a, b[v], acc[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kN; v++) acc[r][v].store(c + r * kPanel + (kV0 + v) * kLanes);
}

// `rows` <= kRows rows times the whole panel.
template <bool kNear, int kR = kRows, class T>
inline void tile_rows(int64_t rows, const float* x, int64_t lda, const T* w, int64_t kc, float* c, bool resume,
                      Prefetch fetch) {
  if constexpr (kR > 1) {
    if (rows < kR) return tile_rows<kNear, kR - 1>(rows, x, lda, w, kc, c, resume, fetch);
  }
  constexpr int kN = kVecs / passes(kR);
  tile<kR, 0, kN, kNear>(x, lda, w, kc, c, resume, fetch);
  if constexpr (kN < kVecs)
    tile<kR, kN, kVecs - kN, kNear>(x, lda, w, kc, c, resume, {fetch.next + kc * fetch.step, fetch.step});
}

}  // namespace llm42::gemm
