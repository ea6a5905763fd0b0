// Panels from dense weights: kPanel columns, transposed to [k][column] in the order of slot().
#pragma once
#include "gemm_lanes.h"

namespace llm42::gemm {

// Element (n, k) of a dense weight stands at data[n * stride_n + k * stride_k].
template <class T>
struct Dense {
  const T* data;
  int64_t stride_n, stride_k;
};

#if !defined(LLM42_GENERIC_VEC) && defined(__AVX2__) && defined(__FMA__)

// r[i] lane j -> r[j] lane i
inline void transpose8(__m256i r[8]) {
  __m256i t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
      u[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

// Eight k of 16 columns whose k are contiguous; `ahead` elements further on is what is packed next.
inline void pack_8x16(const float* w, int64_t stride_n, int64_t ahead, float* out) {
  for (int half = 0; half < 16; half += 8) {
    __m256i r[8];
    for (int i = 0; i < 8; i++) {
      const float* from = w + (half + i) * stride_n;
      __builtin_prefetch(from + ahead, 0, 2);
      r[i] = _mm256_loadu_si256((const __m256i*)from);
    }
    transpose8(r);
    for (int i = 0; i < 8; i++) _mm256_storeu_si256((__m256i*)(out + i * kPanel + half), r[i]);
  }
}

// For 16-bit types: the two columns that share word i of a unit are transposed as one word of 32 bits.
template <class T>
inline void pack_8x16(const T* w, int64_t stride_n, int64_t ahead, T* out) {
  constexpr bool kFar = slot<T>(8) == 1;  // columns i and i + 8 are neighbours, else 2i and 2i + 1
  __m256i r[8];
  for (int i = 0; i < 8; i++) {
    const T* even = w + (kFar ? i : 2 * i) * stride_n;
    const T* odd = even + (kFar ? 8 : 1) * stride_n;
    __builtin_prefetch(even + ahead, 0, 2);
    __builtin_prefetch(odd + ahead, 0, 2);
    const __m128i a = _mm_loadu_si128((const __m128i*)even), b = _mm_loadu_si128((const __m128i*)odd);
    r[i] = _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
  }
  transpose8(r);
  for (int i = 0; i < 8; i++) _mm256_storeu_si256((__m256i*)(out + i * kPanel), r[i]);
}

inline constexpr bool kFastPack = true;

#else

template <class T>
inline void pack_8x16(const T*, int64_t, int64_t, T*) {}
inline constexpr bool kFastPack = false;

#endif

// kc values of k of one panel; columns from `columns` on are zero.
template <class T>
inline void pack_panel(Dense<T> w, int64_t columns, int64_t kc, int64_t ahead, T* out) {
  const bool fast = kFastPack && w.stride_k == 1 && columns >= kPanel;
  int64_t k = 0;
  for (; fast && k + 8 <= kc; k += 8)
    for (int c = 0; c < kPanel; c += 16)
      pack_8x16(w.data + c * w.stride_n + k, w.stride_n, ahead, out + k * kPanel + c);
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
