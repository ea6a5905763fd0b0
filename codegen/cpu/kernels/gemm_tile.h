// The innermost kernel: a few rows of x times one panel of weights over one block of k.
#pragma once
#include <algorithm>

#include "gemm_lanes.h"

namespace llm42::gemm {

// kR rows of x times registers kV0..kV0+kN-1 of a panel. w: [count, kPanel]; c: [kR, kPanel] partial sums,
// continued from if `resume`.
template <class P, int kR, int kV0, int kN, bool kNear>
inline void tile(Rows<P> x, const typename P::Weight* w, int64_t count, float* c, bool resume, Prefetch fetch) {
  constexpr int kLine = 64, kBytes = kN * kLanes * int(sizeof *w) / (kNear ? 2 : 1);
  constexpr int kLines = (kBytes + kLine - 1) / kLine;
  Vec acc[kR][kN];
#pragma GCC unroll 8
  for (int r = 0; r < kR; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kN; v++) acc[r][v] = resume ? Vec::load(c + r * kPanel + (kV0 + v) * kLanes) : Vec::zero();
  // Not unrolled: the body has enough chains, and longer bodies make compilers spill accumulators.
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 8
    for (int line = 0; line < kLines; line++) __builtin_prefetch(fetch.next + line * kLine, 0, kNear ? 3 : 2);
    fetch.next += fetch.step;
    const auto* row = w + i * kPanel + kV0 * kLanes;
    const auto* xi = x.x + i * P::kSteps;
    unrolled<P::kSteps>([&](auto step) {
      using Factor = decltype(P::template weights<step>(row));
      if constexpr (kR < kN) {
        Factor a[kR];
#pragma GCC unroll 8
        for (int r = 0; r < kR; r++) a[r] = P::broadcast(xi[r * x.stride + step]);
#pragma GCC unroll 8
        for (int v = 0; v < kN; v++) {
          const Factor b = P::template weights<step>(row + v * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < kR; r++) acc[r][v] = fma(a[r], b, acc[r][v]);
        }
      } else {
        Factor b[kN];
#pragma GCC unroll 8
        for (int v = 0; v < kN; v++) b[v] = P::template weights<step>(row + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kR; r++) {
          const Factor a = P::broadcast(xi[r * x.stride + step]);
#pragma GCC unroll 8
          for (int v = 0; v < kN; v++) acc[r][v] = fma(a, b[v], acc[r][v]);
        }
      }
    });
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kN; v++) acc[r][v].store(c + r * kPanel + (kV0 + v) * kLanes);
}

// `rows` <= kRows rows times the whole panel.
template <bool kNear, class T, int kR = kRows>
inline void tile_rows(const Chain<T>& product, int64_t rows, Rows<Chain<T>> x, const typename Chain<T>::Weight* w,
                      int64_t count, float* c, bool resume, Prefetch fetch) {
  if constexpr (kR > 1) {
    if (rows < kR) return tile_rows<kNear, T, kR - 1>(product, rows, x, w, count, c, resume, fetch);
  }
  constexpr int kN = kVecs / passes_of_chains(kR);
  unrolled<passes_of_chains(kR)>([&](auto pass) {
    tile<Chain<T>, kR, pass * kN, kN, kNear>(x, w, count, c, resume, {fetch.next + pass * count * fetch.step, fetch.step});
  });
}

}  // namespace llm42::gemm
