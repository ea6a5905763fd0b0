// Sixteen rows of a matrix as columns. Moves bits only.
#pragma once
#include <cstdint>

#include "vec.h"

namespace llm42 {

// out[d * 16 + j] = rows[j * stride + d] for j < count <= 16 and d < dim; lanes from `count` on are 0.
template <class T>
inline void transpose16_plain(const T* rows, int64_t stride, int count, int64_t dim, T* out) {
  for (int64_t d = 0; d < dim; d++)
    for (int j = 0; j < 16; j++) out[d * 16 + j] = j < count ? rows[j * stride + d] : T{};
}

template <class T>
inline void transpose16(const T* rows, int64_t stride, int count, int64_t dim, T* out) {
  transpose16_plain(rows, stride, count, dim, out);
}

#if !defined(LLM42_GENERIC_VEC) && defined(__AVX2__)
// dim is a multiple of 8 in all that follows.
inline void transpose16_words(const uint16_t* rows, int64_t stride, int64_t dim, uint16_t* out) {
  for (int half = 0; half < 16; half += 8)
    for (int64_t d = 0; d < dim; d += 8) {
      __m128i a[8], b[8];
      for (int j = 0; j < 8; j++) a[j] = _mm_loadu_si128((const __m128i*)(rows + (half + j) * stride + d));
      for (int j = 0; j < 4; j++) {
        b[2 * j] = _mm_unpacklo_epi16(a[j], a[j + 4]);
        b[2 * j + 1] = _mm_unpackhi_epi16(a[j], a[j + 4]);
      }
      for (int j = 0; j < 4; j++) {
        a[2 * j] = _mm_unpacklo_epi16(b[j], b[j + 4]);
        a[2 * j + 1] = _mm_unpackhi_epi16(b[j], b[j + 4]);
      }
      for (int j = 0; j < 4; j++) {
        b[2 * j] = _mm_unpacklo_epi16(a[j], a[j + 4]);
        b[2 * j + 1] = _mm_unpackhi_epi16(a[j], a[j + 4]);
      }
      for (int j = 0; j < 8; j++) _mm_storeu_si128((__m128i*)(out + (d + j) * 16 + half), b[j]);
    }
}

template <>
inline void transpose16(const bf16* rows, int64_t stride, int count, int64_t dim, bf16* out) {
  if (count < 16) return transpose16_plain(rows, stride, count, dim, out);
  transpose16_words(&rows->bits, stride, dim, &out->bits);
}

template <>
inline void transpose16(const f16* rows, int64_t stride, int count, int64_t dim, f16* out) {
  if (count < 16) return transpose16_plain(rows, stride, count, dim, out);
  transpose16_words(&rows->bits, stride, dim, &out->bits);
}

template <>
inline void transpose16(const float* rows, int64_t stride, int count, int64_t dim, float* out) {
  if (count < 16) return transpose16_plain(rows, stride, count, dim, out);
  for (int quarter = 0; quarter < 16; quarter += 4)
    for (int64_t d = 0; d < dim; d += 4) {
      __m128 a[4];
      for (int j = 0; j < 4; j++) a[j] = _mm_loadu_ps(rows + (quarter + j) * stride + d);
      _MM_TRANSPOSE4_PS(a[0], a[1], a[2], a[3]);
      for (int j = 0; j < 4; j++) _mm_storeu_ps(out + (d + j) * 16 + quarter, a[j]);
    }
}
#endif

}  // namespace llm42
