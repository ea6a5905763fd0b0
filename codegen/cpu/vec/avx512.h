// AVX-512: a register holds sixteen lanes.
#pragma once
#include <array>

#include "vec/words_x86.h"

#if defined(__AVX512BF16__)
#define LLM42_ISA_NAME "avx512_bf16"
#else
#define LLM42_ISA_NAME "avx512"
#endif

namespace llm42 {

inline constexpr int kLanes = 16, kRegisters = 32;
inline constexpr bool kPlain = false;

struct V16 {
  __m512 v;
  static V16 zero() { return {_mm512_setzero_ps()}; }
  static V16 set1(float x) { return {_mm512_set1_ps(x)}; }
  static V16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static V16 load(const bf16* p) {
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
  }
  static V16 load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  // The low, and the high halves of 32-bit words.
  static V16 load_low(const void* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
  static V16 load_high(const void* p) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000u))))};
  }
  // All 16 values in an order of lanes that is cheap to load; restore_bf16_pairs() undoes it.
  static V16 load_bf16_pairs(const bf16* p) { return load(p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const {
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_blend_epi32(nan, r, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
  }
  void store(f16* p) const { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 0)); }
  friend V16 operator+(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend V16 operator-(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend V16 operator*(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend V16 operator/(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
};
using Vec = V16;

inline V16 fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

#include "vec/links_by_mode.h"
#if defined(__AVX512BF16__)
using PairX = bf16x2;
inline constexpr int kPairSteps = 1;
inline constexpr bool kPairsByMode = false;
struct Pairs {
  __m512i v;
};
inline Pairs pair_factor(PairX x) { return {_mm512_set1_epi32(int(x.bits))}; }
template <int Step>
inline Pairs pair_factor(const bf16x2* p) {
  return {_mm512_loadu_si512(p)};
}
// Sixteen pairs whose halves stand in two rows.
template <int Step>
inline Pairs pair_factor(const bf16* first, const bf16* second) {
  static constexpr auto places = [] {
    std::array<uint16_t, 32> p{};
    for (uint16_t i = 0; i < 16; i++) p[2 * i] = i, p[2 * i + 1] = uint16_t(16 + i);
    return p;
  }();
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)second));
  const __m512i both = _mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)first), 1);
  return {_mm512_permutexvar_epi16(_mm512_loadu_si512(places.data()), both)};
}
// vdpbf16ps: first the high halves, then the low ones.
inline V16 fma(Pairs a, Pairs b, V16 c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)}; }
#else
#include "vec/pairs_by_links.h"
template <int Step>
inline V16 pair_factor(const bf16* first, const bf16* second) {
  return V16::load(Step ? second : first);
}
#endif

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
  return hsum(h);
}
inline float hmax(V16 a) {
  __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  return hmax(h);
}


// 64 bytes.
struct B64 {
  __m512i v;
  static B64 load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  friend B64 operator|(B64 a, B64 b) { return {_mm512_or_si512(a.v, b.v)}; }
};
inline B64 low_nibbles(B64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline B64 high_nibbles(B64 a) { return low_nibbles({_mm512_srli_epi16(a.v, 4)}); }
// `count` bits of every byte from bit `at` on, moved to bits 4 and up.
inline B64 bits_above_nibble(B64 a, int at, int count) {
  const __m512i moved = at < 4 ? _mm512_slli_epi16(a.v, 4 - at) : _mm512_srli_epi16(a.v, at - 4);
  return {_mm512_and_si512(moved, _mm512_set1_epi8(char(((1 << count) - 1) << 4)))};
}

// Sixteen 32-bit integers, one for each lane of V16.
struct I16 {
  __m512i v;
  static I16 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
};
inline V16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// 16 integers of 8 bits as floats.
inline V16 from_bytes(const uint8_t* p) {
  return to_float(I16{_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))});
}
inline V16 from_bytes(const int8_t* p) {
  return to_float(I16{_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))});
}
// acc + the sum of four products in each lane, exactly: of the unsigned bytes of w, which have kBits bits, and
// the four signed bytes of x.
template <int kBits>
inline I16 dot4(I16 acc, B64 w, int32_t x) {
  const __m512i b = _mm512_set1_epi32(x);
#if defined(__AVX512VNNI__)
  return {_mm512_dpbusd_epi32(acc.v, w.v, b)};
#else
  const auto add = [&](__m512i sum, __m512i part) {  // two products of 7 bits with 8 fit 16 bits
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(part, b), _mm512_set1_epi16(1)));
  };
  if constexpr (kBits < 8) return {add(acc.v, w.v)};
  const __m512i top = _mm512_set1_epi8(char(0x80));
  return {add(add(acc.v, _mm512_andnot_si512(top, w.v)), _mm512_and_si512(top, w.v))};
#endif
}

}  // namespace llm42
