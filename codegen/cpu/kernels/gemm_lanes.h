// The shape of the matrix kernel's tiles, and what chains of each dtype are made of.
//
// A packed weight is a sequence of panels of kPanel output columns, on every instruction set:
// packed[panel][k][column], and for bf16 packed[panel][k / 2][column] in pairs. An odd k is padded with zeros.
#pragma once
#include <algorithm>
#include <type_traits>

#include "element.h"

namespace llm42::gemm {

inline constexpr int kPanel = 48;
inline constexpr int kVecs = kPanel / kLanes;
inline constexpr int kRows = kPlain ? 2 : kLanes == 16 ? 8 : 6;  // of a tile

// Passes over the panel that a tile of `rows` rows takes in chains: as many columns at once as there are registers for
// accumulators and factors, less one, without which compilers spill.
inline constexpr int passes_of_chains(int rows) {
  const auto registers = [&](int vecs) { return rows * vecs + std::min(rows, vecs) + 1; };
  int n = 1;
  while (kVecs % n || registers(kVecs / n) >= kRegisters) n++;
  return n;
}

// A product whose elements are one chain each, k ascending (`fma-chain`).
template <class T>
struct Chain {
  using Element = T;
  using Weight = T;  // an element of packed weights; kDepth of k stand in it
  using X = float;   // what x is kept as; kSteps of them meet a Weight, one after the other
  static constexpr int kDepth = 1, kSteps = 1;
  static constexpr int kBlock = 1;       // Weights that are not divided
  static constexpr int kTile = kRows;    // rows that are computed at once,
  static constexpr int kWhole = 1;       // whatever of so many of them there are
  static constexpr bool kFlush = false;  // whether it is computed in FlushMode
  static constexpr int passes(int rows) { return passes_of_chains(rows); }

  static Vec broadcast(X x) { return Vec::set1(x); }
  template <int Step>
  static Vec weights(const T* p) {
    return Vec::load(p);
  }
  // What a row of `depth` Weights is kept as: so many X, of which x[k] for k < n are written, and zeros to whole
  // Weights.
  static int64_t kept(int64_t depth) { return depth; }
  static void keep(const T* x, int64_t n, X* out) { widen(x, n, out); }
};

template <>
struct Chain<bf16> {
  using Element = bf16;
  using Weight = bf16x2;
  using X = PairX;
  static constexpr int kDepth = 2, kSteps = kPairSteps;
  static constexpr int kBlock = 1, kTile = kRows, kWhole = 1;
  static constexpr bool kFlush = kPairsByMode;
  static constexpr int passes(int rows) { return passes_of_chains(rows); }

  static auto broadcast(X x) { return pair_factor(x); }
  template <int Step>
  static auto weights(const bf16x2* p) {
    return pair_factor<Step>(p);
  }
  static int64_t kept(int64_t depth) { return depth * kSteps; }
  static void keep(const bf16* x, int64_t n, X* out) { keep_pairs(x, n, out); }
};

// Rows of x, as P::keep() leaves them.
template <class P>
struct Rows {
  const typename P::X* x;
  int64_t stride;
};

// Weights to fetch while a tile is computed: from `next` on, `step` bytes for every Weight of a column, into L1
// (near) or L2. L1 is better when every weight is used by several tiles: then there is time to fill it. When
// memory is the bottleneck, requests of L1 only get into each other's way.
struct Prefetch {
  const char* next;
  int64_t step;
};

}  // namespace llm42::gemm
