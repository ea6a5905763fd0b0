// Panels from dense weights: kPanel columns, transposed to [k][column].
#pragma once
#include "gemm_lanes.h"
#include "transpose.h"

namespace llm42::gemm {

// Element (n, k) of a dense weight stands at data[n * stride_n + k * stride_k]; n < columns, k < depth.
template <class T>
struct Dense {
  const T* data;
  int64_t stride_n, stride_k, columns, depth;

  T at(int64_t n, int64_t k) const { return n < columns && k < depth ? data[n * stride_n + k * stride_k] : T{}; }
};

// `count` Weights of each column of a panel; what the weight does not have is zero. `ahead` elements further on
// is what is packed next.
template <class T>
inline void pack_panel(const Dense<T>& w, int64_t count, int64_t ahead, typename Chain<T>::Weight* out) {
  constexpr int kDepth = Chain<T>::kDepth;
  const bool fast = w.stride_k == 1 && w.columns >= kPanel;
  int64_t i = 0;
  for (; fast && (i + 8) * kDepth <= w.depth && i + 8 <= count; i += 8)
    for (int c = 0; c < kPanel; c += 16)
      transpose_16x8(w.data + c * w.stride_n + i * kDepth, w.stride_n, ahead, out + i * kPanel + c, kPanel);
  for (; i < count; i++)
    for (int c = 0; c < kPanel; c++) {
      if constexpr (kDepth == 2)
        out[i * kPanel + c] = pair_of(w.at(c, 2 * i), w.at(c, 2 * i + 1));
      else
        out[i * kPanel + c] = w.at(c, i);
    }
}

// One column of a panel back: out[k] for k < depth.
template <class T>
inline void unpack_column(const typename Chain<T>::Weight* packed, int column, int64_t depth, T* out) {
  for (int64_t k = 0; k < depth; k++) {
    const auto w = packed[k / Chain<T>::kDepth * kPanel + column];
    if constexpr (Chain<T>::kDepth == 2)
      out[k] = {uint16_t(k % 2 ? w.bits : w.bits >> 16)};
    else
      out[k] = w;
  }
}

}  // namespace llm42::gemm
