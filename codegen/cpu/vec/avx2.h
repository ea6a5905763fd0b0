// AVX2: a register holds eight lanes.
#pragma once
#include "vec/words_x86.h"

#define LLM42_ISA_NAME "avx2"

namespace llm42 {

inline constexpr int kLanes = 8, kRegisters = 16;
inline constexpr bool kPlain = false;

struct V8 {
  __m256 v;
  static V8 set1(float x) { return {_mm256_set1_ps(x)}; }
  static V8 zero() { return {_mm256_setzero_ps()}; }
  static V8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static V8 load(const bf16* p) {
    const __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16))};
  }
  static V8 load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  // The low, and the high halves of 32-bit words.
  static V8 load_low(const void* p) { return {_mm256_castsi256_ps(_mm256_slli_epi32(W8::load(p).v, 16))}; }
  static V8 load_high(const void* p) {
    // The mask stays in memory: a register for it would be one accumulator less.
    alignas(32) static const uint16_t kHigh[] = {0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff,
                                                 0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff};
    V8 r;
    asm("vpand %2, %1, %0" : "=x"(r.v) : "x"(W8::load(p).v), "m"(kHigh));
    return r;
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    __m256i u = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
  }
  void store(f16* p) const { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, 0)); }
  friend V8 operator+(V8 a, V8 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend V8 operator-(V8 a, V8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend V8 operator*(V8 a, V8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend V8 operator/(V8 a, V8 b) { return {_mm256_div_ps(a.v, b.v)}; }
};
using Vec = V8;

inline V8 fma(V8 a, V8 b, V8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
#include "vec/links_by_mode.h"
#include "vec/pairs_by_links.h"
inline V8 max(V8 a, V8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline V8 min(V8 a, V8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline V8 round_even(V8 a) { return {_mm256_round_ps(a.v, 0x08)}; }
inline V8 scale2(V8 a, V8 n) {
  __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
}
inline V8 select_lt(V8 x, V8 y, V8 a, V8 b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
}
inline V8 low_bits_to_exponent(V8 a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
inline V8 split_exponent(V8 x, V8& m) {
  const __m256i base = _mm256_set1_epi32(0x3f3504f3);
  __m256i u = _mm256_sub_epi32(_mm256_castps_si256(x.v), base);
  m.v = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffff)), base));
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(u, 23))};
}
// Lanes a0 b0 a1 b1 ... -> a: the first eight, b: the others.
inline void zip(V8& a, V8& b) {
  const __m256 x = _mm256_unpacklo_ps(a.v, b.v), y = _mm256_unpackhi_ps(a.v, b.v);
  a.v = _mm256_permute2f128_ps(x, y, 0x20), b.v = _mm256_permute2f128_ps(x, y, 0x31);
}
inline V8 from_uint32_8(const uint32_t* p) {
  // Both halves are exact and so is the product: the one rounding is that of the sum.
  const __m256i u = W8::load(p).v;
  __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(u, 16));
  __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(u, _mm256_set1_epi32(0xffff)));
  return {_mm256_add_ps(_mm256_mul_ps(high, _mm256_set1_ps(65536.f)), low)};
}
inline float hsum(V8 a) { return hsum(a.v); }
inline float hmax(V8 a) { return hmax(a.v); }


// 32 bytes.
struct B32 {
  __m256i v;
  static B32 load(const uint8_t* p) { return {W8::load(p).v}; }
  friend B32 operator|(B32 a, B32 b) { return {_mm256_or_si256(a.v, b.v)}; }
};
inline B32 low_nibbles(B32 a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
inline B32 high_nibbles(B32 a) { return low_nibbles(B32{_mm256_srli_epi16(a.v, 4)}); }
inline B32 bits_above_nibble(B32 a, int at, int count) {
  const __m256i moved = at < 4 ? _mm256_slli_epi16(a.v, 4 - at) : _mm256_srli_epi16(a.v, at - 4);
  return {_mm256_and_si256(moved, _mm256_set1_epi8(char(((1 << count) - 1) << 4)))};
}

// Eight 32-bit integers, one for each lane of V8.
struct I8 {
  __m256i v;
  static I8 set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
};
inline V8 to_float(I8 a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline V8 from_bytes_8(const uint8_t* p) {
  return to_float(I8{_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))});
}
inline V8 from_bytes_8(const int8_t* p) {
  return to_float(I8{_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))});
}
template <int kBits>
inline I8 dot4(I8 acc, B32 w, int32_t x) {
  const __m256i b = _mm256_set1_epi32(x);
  const auto add = [&](__m256i sum, __m256i part) {  // two products of 7 bits with 8 fit 16 bits
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(part, b), _mm256_set1_epi16(1)));
  };
  if constexpr (kBits < 8) return {add(acc.v, w.v)};
  const __m256i top = _mm256_set1_epi8(char(0x80));
  return {add(add(acc.v, _mm256_andnot_si256(top, w.v)), _mm256_and_si256(top, w.v))};
}

}  // namespace llm42

#include "vec/halves.h"
