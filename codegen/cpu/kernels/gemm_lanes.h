// The shape of the matrix kernel's tiles, and the decoding of packed weights.
//
// A packed weight is a sequence of panels of kPanel output columns: packed[panel][k][column]. Where a
// register holds 8 floats, every 16 bf16 columns are stored as 8 words of 32 bits, column i in the low
// half and column i + 8 in the high half, so that a shift and a mask decode two registers from one load.
#pragma once
#include <type_traits>

#include "element.h"

namespace llm42::gemm {

inline constexpr int kPanel = 48;
inline constexpr int kRows = kRegisters / 4;  // of 3 registers: three quarters of them are accumulators
inline constexpr int kVecs = kPanel / kLanes;

template <class T>
inline constexpr bool kInterleaved = kLanes == 8 && std::is_same_v<T, bf16>;

// Register V of the kPanel weights of one k.
template <int V, class T>
inline Vec decode(const T* row) {
  if constexpr (!kInterleaved<T>)
    return Vec::load(row + kLanes * V);
  else if constexpr (V % 2)
    return Vec::load_odd(row + kLanes * (V - 1));
  else
    return Vec::load_even(row + kLanes * V);
}

// Where column c of a panel stands among the kPanel weights of one k.
template <class T>
inline constexpr int slot(int c) {
  if (!kInterleaved<T>) return c;
  const int i = c % 16;
  return c - i + (i < 8 ? 2 * i : 2 * (i - 8) + 1);
}

}  // namespace llm42::gemm
