// Sixteen fp32 lanes with identical semantics on every instruction set.
//
// Every kernel is written in terms of V16, so the bits of a result do not depend on whether it runs on
// AVX-512, AVX2 or anything else: each lane operation is one correctly rounded IEEE operation, and
// horizontal sums have one fixed tree. Contraction is switched off in the build; fma() is the only FMA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if !defined(LLM42_GENERIC_VEC) && defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

namespace llm42 {

inline float bf16_to_float(uint16_t x) {
  uint32_t u = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  _Float16 x;
  std::memcpy(&x, &h, 2);
  return float(x);
}

inline uint16_t float_to_f16(float f) {
  _Float16 x = _Float16(f);
  uint16_t h;
  std::memcpy(&h, &x, 2);
  return h;
}

#if !defined(LLM42_GENERIC_VEC) && defined(__AVX512F__) && defined(__AVX512BW__)
#define LLM42_ISA_NAME "avx512"

struct V16 {
  __m512 v;
  static V16 zero() { return {_mm512_setzero_ps()}; }
  static V16 set1(float x) { return {_mm512_set1_ps(x)}; }
  static V16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static V16 load_bf16(const uint16_t* p) {
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
  }
  static V16 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  friend V16 operator+(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend V16 operator-(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend V16 operator*(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend V16 operator/(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
};
inline V16 fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a > b ? a : b, as the SSE instruction: b when either is NaN.
inline V16 max(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V16 min(V16 a, V16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V16 round_even(V16 a) { return {_mm512_roundscale_ps(a.v, 0x08)}; }
// a * 2^n for integral n in [-126, 127].
inline V16 scale2(V16 a, V16 n) {
  __m512i e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(e))};
}

#elif !defined(LLM42_GENERIC_VEC) && defined(__AVX2__) && defined(__FMA__)
#define LLM42_ISA_NAME "avx2"

struct V16 {
  __m256 lo, hi;
  static V16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static V16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static __m256 widen_bf16(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static V16 load_bf16(const uint16_t* p) {
    return {widen_bf16(_mm_loadu_si128((const __m128i*)p)), widen_bf16(_mm_loadu_si128((const __m128i*)(p + 8)))};
  }
  static V16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  friend V16 operator+(V16 a, V16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  friend V16 operator-(V16 a, V16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  friend V16 operator*(V16 a, V16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  friend V16 operator/(V16 a, V16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
};
inline V16 fma(V16 a, V16 b, V16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline V16 max(V16 a, V16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline V16 min(V16 a, V16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline V16 round_even(V16 a) { return {_mm256_round_ps(a.lo, 0x08), _mm256_round_ps(a.hi, 0x08)}; }
inline __m256 scale2_half(__m256 a, __m256 n) {
  __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(e));
}
inline V16 scale2(V16 a, V16 n) { return {scale2_half(a.lo, n.lo), scale2_half(a.hi, n.hi)}; }

#else
#define LLM42_ISA_NAME "generic"

struct V16 {
  float v[16];
  template <class F>
  static V16 map(F f) {
    V16 r;
    for (int i = 0; i < 16; i++) r.v[i] = f(i);
    return r;
  }
  static V16 zero() { return set1(0.f); }
  static V16 set1(float x) { return map([&](int) { return x; }); }
  static V16 load(const float* p) { return map([&](int i) { return p[i]; }); }
  static V16 load_bf16(const uint16_t* p) { return map([&](int i) { return bf16_to_float(p[i]); }); }
  static V16 load_f16(const uint16_t* p) { return map([&](int i) { return f16_to_float(p[i]); }); }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  friend V16 operator+(V16 a, V16 b) { return map([&](int i) { return a.v[i] + b.v[i]; }); }
  friend V16 operator-(V16 a, V16 b) { return map([&](int i) { return a.v[i] - b.v[i]; }); }
  friend V16 operator*(V16 a, V16 b) { return map([&](int i) { return a.v[i] * b.v[i]; }); }
  friend V16 operator/(V16 a, V16 b) { return map([&](int i) { return a.v[i] / b.v[i]; }); }
};
inline V16 fma(V16 a, V16 b, V16 c) {
  return V16::map([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline V16 max(V16 a, V16 b) { return V16::map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline V16 min(V16 a, V16 b) { return V16::map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline V16 round_even(V16 a) { return V16::map([&](int i) { return __builtin_nearbyintf(a.v[i]); }); }
inline V16 scale2(V16 a, V16 n) {
  return V16::map([&](int i) {
    uint32_t u = uint32_t(int(__builtin_nearbyintf(n.v[i])) + 127) << 23;
    float f;
    std::memcpy(&f, &u, 4);
    return a.v[i] * f;
  });
}
#endif

// Horizontal reductions in one fixed tree: lane i with lane i+8, then +4, +2, +1.
template <class F>
inline float reduce16(V16 a, F f) {
  float x[16];
  a.store(x);
  for (int step = 8; step; step >>= 1)
    for (int i = 0; i < step; i++) x[i] = f(x[i], x[i + step]);
  return x[0];
}
inline float hsum(V16 a) {
  return reduce16(a, [](float x, float y) { return x + y; });
}
inline float hmax(V16 a) {
  return reduce16(a, [](float x, float y) { return x > y ? x : y; });
}

// exp(x) to about 1 ulp. x <= -87.3 (and -inf) gives exactly 0, x >= 88.8 is clamped to a finite value,
// NaN stays NaN: the result is a function of the lane's value alone.
// Range reduction by n*ln2 in two parts and a degree-6 polynomial (Cephes expf).
inline V16 exp(V16 x) {
  const V16 lo = V16::set1(-87.33654f), hi = V16::set1(88.72283f);
  V16 xc = min(hi, max(lo, x));  // operand order lets NaN through
  V16 n = round_even(xc * V16::set1(1.44269504088896341f));
  n = min(V16::set1(127.f), n);
  V16 r = fma(n, V16::set1(-0.693359375f), xc);
  r = fma(n, V16::set1(2.12194440e-4f), r);
  V16 p = V16::set1(1.9875691500e-4f);
  p = fma(p, r, V16::set1(1.3981999507e-3f));
  p = fma(p, r, V16::set1(8.3334519073e-3f));
  p = fma(p, r, V16::set1(4.1665795894e-2f));
  p = fma(p, r, V16::set1(1.6666665459e-1f));
  p = fma(p, r, V16::set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + V16::set1(1.f);
  V16 y = scale2(p, n);
  float in[16], out[16];
  x.store(in);
  y.store(out);
  for (int i = 0; i < 16; i++) out[i] = in[i] <= -87.33654f ? 0.f : out[i];
  return V16::load(out);
}

}  // namespace llm42
