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

inline uint32_t bits_of_float(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float float_of_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline float bf16_to_float(uint16_t x) {
  return float_of_bits(uint32_t(x) << 16);
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  uint32_t u = bits_of_float(f);
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

// Storage types of tensors, so that kernels can be templates over them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bf16_to_float(x.bits); }
inline float to_float(f16 x) { return f16_to_float(x.bits); }
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  return {float_to_bf16(x)};
}
template <>
inline f16 from_float<f16>(float x) {
  return {float_to_f16(x)};
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
  // All 16 values in an order of lanes that is cheap to load; restore_bf16_pairs() undoes it.
  static V16 load_bf16_pairs(const uint16_t* p) { return load_bf16(p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_bf16(uint16_t* p) const {
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_blend_epi32(nan, r, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
  }
  void store_f16(uint16_t* p) const { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 0)); }
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
// x < y ? a : b (b when x or y is NaN).
inline V16 select_lt(V16 x, V16 y, V16 a, V16 b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
// The float whose bits are those of a, shifted left by 23 (the low bits become the exponent).
inline V16 low_bits_to_exponent(V16 a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
// x = m * 2^e for normal x > 0, with m in [sqrt(1/2), sqrt(2)); returns e.
inline V16 split_exponent(V16 x, V16& m) {
  const __m512i base = _mm512_set1_epi32(0x3f3504f3);
  __m512i u = _mm512_sub_epi32(_mm512_castps_si512(x.v), base);
  m.v = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_and_si512(u, _mm512_set1_epi32(0x7fffff)), base));
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(u, 23))};
}
inline V16 restore_bf16_pairs(V16 a) { return a; }
// 16 unsigned integers as floats, correctly rounded.
inline V16 from_uint32(const uint32_t* u) { return {_mm512_cvtepu32_ps(_mm512_loadu_si512(u))}; }
// Sum and maximum in one fixed tree: lane i with lane i+8, then +4, +2, +1.
inline float hsum(V16 a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float hmax(V16 a) {
  __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
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
  // All 16 values in an order of lanes that is cheap to load; restore_bf16_pairs() undoes it.
  static V16 load_bf16_pairs(const uint16_t* p) {
    __m256i w = _mm256_loadu_si256((const __m256i*)p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000u))))};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  static __m256i narrow_bf16(__m256 v) {
    __m256i u = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  }
  void store_bf16(uint16_t* p) const {
    __m256i packed = _mm256_packus_epi32(narrow_bf16(lo), narrow_bf16(hi));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
  }
  void store_f16(uint16_t* p) const {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(lo, 0));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(hi, 0));
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
// x < y ? a : b (b when x or y is NaN).
inline V16 select_lt(V16 x, V16 y, V16 a, V16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_LT_OQ))};
}
// The float whose bits are those of a, shifted left by 23 (the low bits become the exponent).
inline V16 low_bits_to_exponent(V16 a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.lo), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.hi), 23))};
}
inline __m256 split_exponent_half(__m256 x, __m256& m) {
  const __m256i base = _mm256_set1_epi32(0x3f3504f3);
  __m256i u = _mm256_sub_epi32(_mm256_castps_si256(x), base);
  m = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffff)), base));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(u, 23));
}
// x = m * 2^e for normal x > 0, with m in [sqrt(1/2), sqrt(2)); returns e.
inline V16 split_exponent(V16 x, V16& m) {
  V16 e;
  e.lo = split_exponent_half(x.lo, m.lo);
  e.hi = split_exponent_half(x.hi, m.hi);
  return e;
}
inline V16 restore_bf16_pairs(V16 a) {
  __m256 x = _mm256_unpacklo_ps(a.lo, a.hi), y = _mm256_unpackhi_ps(a.lo, a.hi);
  return {_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31)};
}
inline __m256 from_uint32_half(__m256i u) {
  // Both halves are exact and so is the product: the one rounding is that of the sum.
  __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(u, 16));
  __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(u, _mm256_set1_epi32(0xffff)));
  return _mm256_add_ps(_mm256_mul_ps(high, _mm256_set1_ps(65536.f)), low);
}
// 16 unsigned integers as floats, correctly rounded.
inline V16 from_uint32(const uint32_t* u) {
  return {from_uint32_half(_mm256_loadu_si256((const __m256i*)u)),
          from_uint32_half(_mm256_loadu_si256((const __m256i*)(u + 8)))};
}
// Sum and maximum in one fixed tree: lane i with lane i+8, then +4, +2, +1.
inline float hsum(V16 a) {
  __m256 h = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float hmax(V16 a) {
  __m256 h = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

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
  static V16 load_bf16_pairs(const uint16_t* p) { return load_bf16(p); }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  void store_bf16(uint16_t* p) const {
    for (int i = 0; i < 16; i++) p[i] = float_to_bf16(v[i]);
  }
  void store_f16(uint16_t* p) const {
    for (int i = 0; i < 16; i++) p[i] = float_to_f16(v[i]);
  }
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
    return a.v[i] * float_of_bits(uint32_t(int(__builtin_nearbyintf(n.v[i])) + 127) << 23);
  });
}
inline V16 select_lt(V16 x, V16 y, V16 a, V16 b) {
  return V16::map([&](int i) { return x.v[i] < y.v[i] ? a.v[i] : b.v[i]; });
}
inline V16 low_bits_to_exponent(V16 a) {
  return V16::map([&](int i) { return float_of_bits(bits_of_float(a.v[i]) << 23); });
}
inline V16 split_exponent(V16 x, V16& m) {
  V16 e;
  for (int i = 0; i < 16; i++) {
    uint32_t u = bits_of_float(x.v[i]) - 0x3f3504f3u;
    m.v[i] = float_of_bits((u & 0x7fffffu) + 0x3f3504f3u);
    e.v[i] = float(int32_t(u) >> 23);
  }
  return e;
}
inline V16 restore_bf16_pairs(V16 a) { return a; }
inline V16 from_uint32(const uint32_t* u) { return V16::map([&](int i) { return float(u[i]); }); }
inline float hsum(V16 a) {
  for (int step = 8; step; step >>= 1)
    for (int i = 0; i < step; i++) a.v[i] += a.v[i + step];
  return a.v[0];
}
inline float hmax(V16 a) {
  for (int step = 8; step; step >>= 1)
    for (int i = 0; i < step; i++) a.v[i] = a.v[i] > a.v[i + step] ? a.v[i] : a.v[i + step];
  return a.v[0];
}
#endif

inline V16 load(const float* p) { return V16::load(p); }
inline V16 load(const bf16* p) { return V16::load_bf16(&p->bits); }
inline V16 load(const f16* p) { return V16::load_f16(&p->bits); }
inline void store(V16 a, float* p) { a.store(p); }
inline void store(V16 a, bf16* p) { a.store_bf16(&p->bits); }
inline void store(V16 a, f16* p) { a.store_f16(&p->bits); }

// exp(x) = 2^n e^r. e^r for |r| <= ln2/2, by the degree-6 polynomial of Cephes expf; ln2 in two parts.
inline V16 exp_reduced(V16 x, V16 n) {
  V16 r = fma(n, V16::set1(-0.693359375f), x);
  r = fma(n, V16::set1(2.12194440e-4f), r);
  V16 p = V16::set1(1.9875691500e-4f);
  p = fma(p, r, V16::set1(1.3981999507e-3f));
  p = fma(p, r, V16::set1(8.3334519073e-3f));
  p = fma(p, r, V16::set1(4.1665795894e-2f));
  p = fma(p, r, V16::set1(1.6666665459e-1f));
  p = fma(p, r, V16::set1(5.0000001201e-1f));
  return fma(p, r * r, r) + V16::set1(1.f);
}

// exp(x) within 2 ulp for every x: gradual underflow, 0 for -inf, inf from 88.73 on, NaN stays NaN.
inline V16 exp(V16 x) {
  V16 xc = min(V16::set1(89.f), max(V16::set1(-104.f), x));  // operand order lets NaN through
  V16 n = round_even(xc * V16::set1(1.44269504088896341f));
  V16 half = round_even(n * V16::set1(0.5f));
  return scale2(scale2(exp_reduced(xc, n), half), n - half);
}

// exp(x) within 2 ulp for x <= 0, for softmax: a little cheaper, and exactly 0 below -126.5 ln2 (and at
// -inf). NaN stays NaN.
inline V16 exp_nonpositive(V16 x) {
  const V16 magic = V16::set1(12582912.f + 127.f);  // 1.5 * 2^23: the sum's low bits are n + 127
  V16 xc = max(V16::set1(-88.f), x);
  V16 t = fma(xc, V16::set1(1.44269504088896341f), magic);
  return exp_reduced(xc, t - magic) * low_bits_to_exponent(t);
}
inline float exp_nonpositive(float x) {
  float y[16];
  exp_nonpositive(V16::set1(x)).store(y);
  return y[0];
}

// log(2^e (1 + f)) for f in [sqrt(1/2) - 1, sqrt(2) - 1], by the polynomial of Cephes logf.
inline V16 log_reduced(V16 f, V16 e) {
  V16 z = f * f;
  V16 p = V16::set1(7.0376836292e-2f);
  p = fma(p, f, V16::set1(-1.1514610310e-1f));
  p = fma(p, f, V16::set1(1.1676998740e-1f));
  p = fma(p, f, V16::set1(-1.2420140846e-1f));
  p = fma(p, f, V16::set1(1.4249322787e-1f));
  p = fma(p, f, V16::set1(-1.6668057665e-1f));
  p = fma(p, f, V16::set1(2.0000714765e-1f));
  p = fma(p, f, V16::set1(-2.4999993993e-1f));
  p = fma(p, f, V16::set1(3.3333331174e-1f));
  V16 y = fma(e, V16::set1(-2.12194440e-4f), p * f * z);
  y = fma(V16::set1(-0.5f), z, y);
  return fma(e, V16::set1(0.693359375f), f + y);
}

// log(x) within 2 ulp: -inf at 0, NaN below, inf at inf, denormals included.
inline V16 log(V16 x) {
  const V16 tiny = V16::set1(1.17549435e-38f), infinity = V16::set1(INFINITY);
  V16 scaled = select_lt(x, tiny, x * V16::set1(8388608.f), x);
  V16 m;
  V16 e = split_exponent(scaled, m) - select_lt(x, tiny, V16::set1(23.f), V16::zero());
  V16 y = log_reduced(m - V16::set1(1.f), e);
  y = select_lt(x, infinity, y, x);  // inf and NaN
  y = select_lt(V16::zero(), x, y, V16::set1(-INFINITY));
  y = select_lt(x, V16::zero(), V16::set1(NAN), y);
  return select_lt(x, infinity, y, x);
}
inline float log(float x) {
  float y[16];
  log(V16::set1(x)).store(y);
  return y[0];
}

// -log(1 - u) within 3 ulp for u in (0, 1), also near 0, where 1 - u has lost the bits of u.
inline V16 neg_log1m(V16 u) {
  V16 m;
  V16 e = split_exponent(V16::set1(1.f) - u, m);
  const V16 limit = V16::set1(0.29f);  // below it 1 - u needs no change of exponent
  V16 f = select_lt(u, limit, V16::zero() - u, m - V16::set1(1.f));
  return V16::zero() - log_reduced(f, select_lt(u, limit, V16::zero(), e));
}

// tanh(x) within 2 ulp; the sign of zero is kept, NaN stays NaN (Cephes tanhf).
inline V16 tanh(V16 x) {
  V16 z = x * x;
  V16 p = V16::set1(-5.70498872745e-3f);
  p = fma(p, z, V16::set1(2.06390887954e-2f));
  p = fma(p, z, V16::set1(-5.37397155531e-2f));
  p = fma(p, z, V16::set1(1.33314422036e-1f));
  p = fma(p, z, V16::set1(-3.33332819422e-1f));
  V16 small = x * fma(p, z, V16::set1(1.f));
  V16 a = max(x, V16::zero() - x);  // |x|, and NaN for NaN
  V16 large = V16::set1(1.f) - V16::set1(2.f) / (exp(a + a) + V16::set1(1.f));
  large = select_lt(x, V16::zero(), V16::zero() - large, large);
  return select_lt(a, V16::set1(0.625f), small, large);
}

}  // namespace llm42
