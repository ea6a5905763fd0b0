// Sixteen rows of a matrix as columns. Moves bits only.
#pragma once
#include <type_traits>

#include "vec.h"

namespace llm42 {

// Eight elements of sixteen rows, `stride` apart: out[i * out_stride + j] = rows[j * stride + i]; of bf16 to
// bf16x2, eight pairs. `ahead` elements further on is what is read next.
template <class In, class Out>
inline void transpose_16x8(const In* rows, int64_t stride, int64_t ahead, Out* out, int64_t out_stride) {
  W8 r[8];
  if constexpr (sizeof(Out) == 4) {
    for (int half = 0; half < 16; half += 8) {
      for (int j = 0; j < 8; j++) {
        const In* row = rows + (half + j) * stride;
        __builtin_prefetch(row + ahead, 0, 2);
        r[j] = W8::load(row);
        if constexpr (std::is_same_v<Out, bf16x2>) r[j] = r[j].halves_swapped();
      }
      transpose(r);
      for (int i = 0; i < 8; i++) r[i].store(out + i * out_stride + half);
    }
  } else {  // two rows are transposed as one of words
    for (int j = 0; j < 8; j++) {
      const In *low = rows + 2 * j * stride, *high = low + stride;
      __builtin_prefetch(low + ahead, 0, 2);
      __builtin_prefetch(high + ahead, 0, 2);
      r[j] = W8::interleaved(low, high);
    }
    transpose(r);
    for (int i = 0; i < 8; i++) r[i].store(out + i * out_stride);
  }
}

// out[d * 16 + j] = rows[j * stride + d] for j < count <= 16 and d < dim, a multiple of 8; lanes from `count`
// on are 0.
template <class T>
inline void transpose16(const T* rows, int64_t stride, int count, int64_t dim, T* out) {
  if (count == 16) {
    for (int64_t d = 0; d < dim; d += 8) transpose_16x8(rows + d, stride, 0, out + d * 16, 16);
    return;
  }
  for (int64_t d = 0; d < dim; d++)
    for (int j = 0; j < 16; j++) out[d * 16 + j] = j < count ? rows[j * stride + d] : T{};
}

}  // namespace llm42
