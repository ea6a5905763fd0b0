// V16 where a register holds eight lanes: two of them.
#pragma once

namespace llm42 {

struct V16 {
  V8 lo, hi;
  static V16 zero() { return {V8::zero(), V8::zero()}; }
  static V16 set1(float x) { return {V8::set1(x), V8::set1(x)}; }
  template <class T>
  static V16 load(const T* p) {
    return {V8::load(p), V8::load(p + 8)};
  }
  // All 16 values in an order of lanes that is cheap to load; restore_bf16_pairs() undoes it.
  static V16 load_bf16_pairs(const bf16* p) { return {V8::load_low(p), V8::load_high(p)}; }
  template <class T>
  void store(T* p) const {
    lo.store(p), hi.store(p + 8);
  }
  friend V16 operator+(V16 a, V16 b) { return {a.lo + b.lo, a.hi + b.hi}; }
  friend V16 operator-(V16 a, V16 b) { return {a.lo - b.lo, a.hi - b.hi}; }
  friend V16 operator*(V16 a, V16 b) { return {a.lo * b.lo, a.hi * b.hi}; }
  friend V16 operator/(V16 a, V16 b) { return {a.lo / b.lo, a.hi / b.hi}; }
};

inline V16 fma(V16 a, V16 b, V16 c) { return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)}; }
// a > b ? a : b, as the SSE instruction: b when either is NaN.
inline V16 max(V16 a, V16 b) { return {max(a.lo, b.lo), max(a.hi, b.hi)}; }
inline V16 min(V16 a, V16 b) { return {min(a.lo, b.lo), min(a.hi, b.hi)}; }
inline V16 round_even(V16 a) { return {round_even(a.lo), round_even(a.hi)}; }
// a * 2^n for integral n in [-126, 127].
inline V16 scale2(V16 a, V16 n) { return {scale2(a.lo, n.lo), scale2(a.hi, n.hi)}; }
// x < y ? a : b (b when x or y is NaN).
inline V16 select_lt(V16 x, V16 y, V16 a, V16 b) {
  return {select_lt(x.lo, y.lo, a.lo, b.lo), select_lt(x.hi, y.hi, a.hi, b.hi)};
}
// The float whose bits are those of a, shifted left by 23 (the low bits become the exponent).
inline V16 low_bits_to_exponent(V16 a) { return {low_bits_to_exponent(a.lo), low_bits_to_exponent(a.hi)}; }
// x = m * 2^e for normal x > 0, with m in [sqrt(1/2), sqrt(2)); returns e.
inline V16 split_exponent(V16 x, V16& m) { return {split_exponent(x.lo, m.lo), split_exponent(x.hi, m.hi)}; }
// Sixteen pairs whose halves stand in two rows, for a chain in V16; its lanes are those of load_bf16_pairs().
struct Pairs16 {
  decltype(pair_factor(PairX{})) lo, hi;
};
template <int Step>
inline Pairs16 pair_factor(const bf16* first, const bf16* second) {
  const V16 x = V16::load_bf16_pairs(Step ? second : first);
  return {pair_factor(x.lo), pair_factor(x.hi)};
}
inline V16 fma(decltype(pair_factor(PairX{})) a, Pairs16 b, V16 c) { return {fma(a, b.lo, c.lo), fma(a, b.hi, c.hi)}; }
inline V16 restore_bf16_pairs(V16 a) {
  zip(a.lo, a.hi);
  return a;
}
// 16 unsigned integers as floats, correctly rounded.
inline V16 from_uint32(const uint32_t* u) { return {from_uint32_8(u), from_uint32_8(u + 8)}; }
// Sum and maximum in one fixed tree: lane i with lane i+8, then +4, +2, +1.
inline float hsum(V16 a) { return hsum(a.lo + a.hi); }
inline float hmax(V16 a) { return hmax(max(a.lo, a.hi)); }


// 64 bytes.
struct B64 {
  B32 lo, hi;
  static B64 load(const uint8_t* p) { return {B32::load(p), B32::load(p + 32)}; }
  friend B64 operator|(B64 a, B64 b) { return {a.lo | b.lo, a.hi | b.hi}; }
};
inline B64 low_nibbles(B64 a) { return {low_nibbles(a.lo), low_nibbles(a.hi)}; }
inline B64 high_nibbles(B64 a) { return {high_nibbles(a.lo), high_nibbles(a.hi)}; }
// `count` bits of every byte from bit `at` on, moved to bits 4 and up.
inline B64 bits_above_nibble(B64 a, int at, int count) {
  return {bits_above_nibble(a.lo, at, count), bits_above_nibble(a.hi, at, count)};
}

// Sixteen 32-bit integers, one for each lane of V16.
struct I16 {
  I8 lo, hi;
  static I16 set1(int32_t x) { return {I8::set1(x), I8::set1(x)}; }
};
inline V16 to_float(I16 a) { return {to_float(a.lo), to_float(a.hi)}; }
// 16 integers of 8 bits as floats.
template <class T>
inline V16 from_bytes(const T* p) {
  return {from_bytes_8(p), from_bytes_8(p + 8)};
}
// acc + the sum of four products in each lane, exactly: of the unsigned bytes of w, which have kBits bits, and
// the four signed bytes of x.
template <int kBits>
inline I16 dot4(I16 acc, B64 w, int32_t x) {
  return {dot4<kBits>(acc.lo, w.lo, x), dot4<kBits>(acc.hi, w.hi, x)};
}

}  // namespace llm42
