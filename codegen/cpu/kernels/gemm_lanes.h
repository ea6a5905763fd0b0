// The shape of the matrix kernel's tiles, and what products of each dtype are made of.
//
// A packed weight is a sequence of panels of kPanel output columns, on every instruction set:
// packed[panel][k][column], and for bf16 packed[panel][k / 2][column] in pairs. An odd k is padded with zeros.
#pragma once
#include <type_traits>

#include "element.h"

namespace llm42::gemm {

inline constexpr int kPanel = 48;
inline constexpr int kVecs = kPanel / kLanes;
inline constexpr int kRows = kLanes == 16 ? 8 : 6;  // of a tile

template <class T>
struct Product {
  using Weight = T;  // an element of packed weights; kDepth of k stand in it
  using X = float;   // what x is kept as; kSteps of them meet a Weight, one after the other
  static constexpr int kDepth = 1, kSteps = 1;
  static constexpr bool kFlush = false;  // whether it is computed in FlushMode

  static Vec broadcast(X x) { return Vec::set1(x); }
  template <int Step>
  static Vec weights(const T* p) {
    return Vec::load(p);
  }
  // x[k] for k < n to out, padded to whole Weights.
  static void keep(const T* x, int64_t n, X* out) { widen(x, n, out); }
};

template <>
struct Product<bf16> {
  using Weight = bf16x2;
  using X = PairX;
  static constexpr int kDepth = 2, kSteps = kPairSteps;
  static constexpr bool kFlush = kPairsByMode;

  static auto broadcast(X x) { return pair_factor(x); }
  template <int Step>
  static auto weights(const bf16x2* p) {
    return pair_factor<Step>(p);
  }
  static void keep(const bf16* x, int64_t n, X* out) { keep_pairs(x, n, out); }
};

}  // namespace llm42::gemm
