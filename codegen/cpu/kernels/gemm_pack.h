// Panels from dense weights: kPanel columns, transposed to [k][column] in the order of slot().
#pragma once
#include "gemm_lanes.h"
#include "transpose.h"

namespace llm42::gemm {

// Element (n, k) of a dense weight stands at data[n * stride_n + k * stride_k].
template <class T>
struct Dense {
  const T* data;
  int64_t stride_n, stride_k;
};

// kc values of k of one panel; columns from `columns` on are zero.
template <class T>
inline void pack_panel(Dense<T> w, int64_t columns, int64_t kc, int64_t ahead, T* out) {
  const bool fast = w.stride_k == 1 && columns >= kPanel;
  int64_t k = 0;
  for (; fast && k + 8 <= kc; k += 8)
    for (int c = 0; c < kPanel; c += 16)
      transpose_16x8<kInterleaved<T>>(w.data + c * w.stride_n + k, w.stride_n, ahead, out + k * kPanel + c, kPanel);
  for (; k < kc; k++)
    for (int c = 0; c < kPanel; c++)
      out[k * kPanel + slot<T>(c)] = c < columns ? w.data[c * w.stride_n + k * w.stride_k] : T{};
}

// One column of a panel back: out[k] for k < kc.
template <class T>
inline void unpack_column(const T* packed, int column, int64_t kc, T* out) {
  for (int64_t k = 0; k < kc; k++) out[k] = packed[k * kPanel + slot<T>(column)];
}

}  // namespace llm42::gemm
