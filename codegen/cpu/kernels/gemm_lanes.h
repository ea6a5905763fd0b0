// Registers of the matrix kernel: native vector width, and the decoding of packed weights.
//
// A packed weight is a sequence of panels of kPanel output columns: packed[panel][k][column]. Where a
// register holds 8 floats, every 16 bf16 columns are stored as 8 words of 32 bits, column i in the low
// half and column i + 8 in the high half, so that a shift and a mask decode two registers from one load.
#pragma once
#include <type_traits>

#include "element.h"

namespace llm42::gemm {

inline constexpr int kPanel = 48;

#if !defined(LLM42_GENERIC_VEC) && defined(__AVX512F__) && defined(__AVX512BW__)

inline constexpr int kLanes = 16;
inline constexpr int kRows = 8;  // 8 rows x 3 registers = 24 accumulators of 32 registers
inline constexpr bool kInterleaved = false;
using Vec = __m512;
inline Vec vzero() { return _mm512_setzero_ps(); }
inline Vec vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline Vec vset1(float x) { return _mm512_set1_ps(x); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

// Register V of the kPanel weights of one k.
template <int V, class T>
inline Vec decode(const T* row) {
  return load(row + 16 * V).v;
}

#elif !defined(LLM42_GENERIC_VEC) && defined(__AVX2__) && defined(__FMA__)

inline constexpr int kLanes = 8;
inline constexpr int kRows = 4;  // 4 rows x 3 registers = 12 accumulators of 16 registers
inline constexpr bool kInterleaved = true;
using Vec = __m256;
inline Vec vzero() { return _mm256_setzero_ps(); }
inline Vec vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline Vec vset1(float x) { return _mm256_set1_ps(x); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

template <int V>
inline Vec decode(const float* row) {
  return _mm256_loadu_ps(row + 8 * V);
}
template <int V>
inline Vec decode(const f16* row) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(row + 8 * V)));
}
template <int V>
inline Vec decode(const bf16* row) {
  const __m256i pairs = _mm256_loadu_si256((const __m256i*)(row + 16 * (V / 2)));
  return _mm256_castsi256_ps(V % 2 ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u)))
                                   : _mm256_slli_epi32(pairs, 16));
}

#else

inline constexpr int kLanes = 8;
inline constexpr int kRows = 4;
inline constexpr bool kInterleaved = true;
struct Vec {
  float v[8];
};
inline Vec vset1(float x) { return {{x, x, x, x, x, x, x, x}}; }
inline Vec vzero() { return vset1(0.f); }
inline Vec vload(const float* p) {
  Vec a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
inline void vstore(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
inline Vec vfma(Vec a, Vec b, Vec c) {
  Vec r;
  for (int i = 0; i < 8; i++) r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
}

template <int V, class T>
inline Vec decode(const T* row) {
  Vec r;
  for (int i = 0; i < 8; i++) {
    if constexpr (std::is_same_v<T, bf16>)
      r.v[i] = to_float(row[16 * (V / 2) + 2 * i + V % 2]);
    else
      r.v[i] = to_float(row[8 * V + i]);
  }
  return r;
}

#endif

inline constexpr int kVecs = kPanel / kLanes;

// Where column c of a panel stands among the kPanel weights of one k.
template <class T>
inline constexpr int slot(int c) {
  if (!kInterleaved || !std::is_same_v<T, bf16>) return c;
  const int i = c % 16;
  return c - i + (i < 8 ? 2 * i : 2 * (i - 8) + 1);
}

}  // namespace llm42::gemm
