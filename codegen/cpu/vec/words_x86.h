// What AVX2 and AVX-512 share: eight words of 32 bits, and the ends of the trees of sums.
#pragma once
#include <immintrin.h>

#include "vec.h"

namespace llm42 {

struct W8 {
  __m256i v;
  static W8 set1(uint32_t x) { return {_mm256_set1_epi32(int(x))}; }
  static W8 ascending(uint32_t from) {
    return {_mm256_add_epi32(set1(from).v, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  static W8 load(const void* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
  // Word i: the i-th 16 bits of `low`, and above them those of `high`.
  static W8 interleaved(const void* low, const void* high) {
    const __m128i a = _mm_loadu_si128((const __m128i*)low), b = _mm_loadu_si128((const __m128i*)high);
    return {_mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b))};
  }
  void store(void* p) const { _mm256_storeu_si256((__m256i*)p, v); }
  W8 halves_swapped() const { return {_mm256_or_si256(_mm256_slli_epi32(v, 16), _mm256_srli_epi32(v, 16))}; }
  friend W8 operator^(W8 a, W8 b) { return {_mm256_xor_si256(a.v, b.v)}; }
};

// The halves of 64-bit products.
inline void multiply(W8 a, W8 b, W8& high, W8& low) {
  const __m256i even = _mm256_mul_epu32(a.v, b.v), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), b.v);
  low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

// r[i] lane j -> r[j] lane i
inline void transpose(W8 (&r)[8]) {
  __m256i t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_epi32(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
      u[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    r[i].v = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

inline float hsum(__m256 h) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float hmax(__m256 h) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

}  // namespace llm42
