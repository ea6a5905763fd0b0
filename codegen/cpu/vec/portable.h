// Plain C++, on any machine: eight lanes as an array.
#pragma once
#include "vec.h"

#define LLM42_ISA_NAME "generic"

namespace llm42 {

inline constexpr int kLanes = 8, kRegisters = 16;
inline constexpr bool kPlain = true;

struct W8 {
  uint32_t v[8];
  template <class F>
  static W8 map(F f) {
    W8 r;
    for (int i = 0; i < 8; i++) r.v[i] = f(i);
    return r;
  }
  static W8 set1(uint32_t x) { return map([&](int) { return x; }); }
  static W8 ascending(uint32_t from) { return map([&](int i) { return from + uint32_t(i); }); }
  static W8 load(const void* p) {
    W8 r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static W8 interleaved(const void* low, const void* high) {
    uint16_t a[8], b[8];
    std::memcpy(a, low, sizeof a), std::memcpy(b, high, sizeof b);
    return map([&](int i) { return a[i] | uint32_t(b[i]) << 16; });
  }
  void store(void* p) const { std::memcpy(p, v, sizeof v); }
  W8 halves_swapped() const {
    return map([&](int i) { return v[i] << 16 | v[i] >> 16; });
  }
  friend W8 operator^(W8 a, W8 b) {
    return map([&](int i) { return a.v[i] ^ b.v[i]; });
  }
};

inline void multiply(W8 a, W8 b, W8& high, W8& low) {
  for (int i = 0; i < 8; i++) {
    const uint64_t product = uint64_t(a.v[i]) * b.v[i];
    high.v[i] = uint32_t(product >> 32), low.v[i] = uint32_t(product);
  }
}

inline void transpose(W8 (&r)[8]) {
  W8 t[8];
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) t[i].v[j] = r[j].v[i];
  std::memcpy(r, t, sizeof t);
}

struct V8 {
  float v[8];
  template <class F>
  static V8 map(F f) {
    V8 r;
    for (int i = 0; i < 8; i++) r.v[i] = f(i);
    return r;
  }
  static V8 zero() { return set1(0.f); }
  static V8 set1(float x) { return map([&](int) { return x; }); }
  template <class T>
  static V8 load(const T* p) {
    return map([&](int i) { return to_float(p[i]); });
  }
  // The low, and the high halves of 32-bit words, in the order of W8::interleaved().
  static V8 load_low(const bf16* p) { return map([&](int i) { return to_float(p[2 * i]); }); }
  static V8 load_high(const bf16* p) { return map([&](int i) { return to_float(p[2 * i + 1]); }); }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < 8; i++) p[i] = from_float<T>(v[i]);
  }
  friend V8 operator+(V8 a, V8 b) { return map([&](int i) { return a.v[i] + b.v[i]; }); }
  friend V8 operator-(V8 a, V8 b) { return map([&](int i) { return a.v[i] - b.v[i]; }); }
  friend V8 operator*(V8 a, V8 b) { return map([&](int i) { return a.v[i] * b.v[i]; }); }
  friend V8 operator/(V8 a, V8 b) { return map([&](int i) { return a.v[i] / b.v[i]; }); }
};
using Vec = V8;

inline V8 fma(V8 a, V8 b, V8 c) {
  return V8::map([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}

// A number of a chain of bf16 products.
struct Flushed {
  V8 v;
};
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

using LinkX = float;
inline constexpr bool kLinksByMode = false;
inline Flushed link_factor(LinkX x) { return {V8::set1(flushed(x))}; }
inline Flushed link_factor(V8 x) {
  return {V8::map([&](int i) { return flushed(x.v[i]); })};
}
template <int Step>
inline Flushed link_factor(const bf16x2* p) {
  return {V8::map([&](int i) { return flushed(float_of_bits(Step ? p[i].bits << 16 : p[i].bits & 0xffff0000u)); })};
}
inline V8 sum_of_chains(V8 a, V8 b) {
  return V8::map([&](int i) { return flushed(a.v[i] + b.v[i]); });
}
#include "vec/pairs_by_links.h"

// By doubles: the product of two bf16 numbers is exact there, and so is the sum, or else the smaller term is too small
// to decide how the greater one, which a float holds, is rounded. What rounds to less than the least normal number,
// had exponents no end, becomes zero.
inline V8 fma(Flushed a, Flushed b, V8 c) {
  return V8::map([&](int i) {
    const double sum = double(a.v.v[i]) * b.v.v[i] + c.v[i];
    const float rounded = float(sum);
    return std::fabs(sum) < 0x1p-126 - 0x1p-151 ? std::copysign(0.f, rounded) : rounded;
  });
}

inline V8 max(V8 a, V8 b) { return V8::map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline V8 min(V8 a, V8 b) { return V8::map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline V8 round_even(V8 a) { return V8::map([&](int i) { return __builtin_nearbyintf(a.v[i]); }); }
inline V8 scale2(V8 a, V8 n) {
  return V8::map([&](int i) {
    return a.v[i] * float_of_bits(uint32_t(int(__builtin_nearbyintf(n.v[i])) + 127) << 23);
  });
}
inline V8 select_lt(V8 x, V8 y, V8 a, V8 b) {
  return V8::map([&](int i) { return x.v[i] < y.v[i] ? a.v[i] : b.v[i]; });
}
inline V8 low_bits_to_exponent(V8 a) {
  return V8::map([&](int i) { return float_of_bits(bits_of_float(a.v[i]) << 23); });
}
inline V8 split_exponent(V8 x, V8& m) {
  V8 e;
  for (int i = 0; i < 8; i++) {
    uint32_t u = bits_of_float(x.v[i]) - 0x3f3504f3u;
    m.v[i] = float_of_bits((u & 0x7fffffu) + 0x3f3504f3u);
    e.v[i] = float(int32_t(u) >> 23);
  }
  return e;
}
inline void zip(V8& a, V8& b) {
  float both[16];
  for (int i = 0; i < 8; i++) both[2 * i] = a.v[i], both[2 * i + 1] = b.v[i];
  a = V8::load(both), b = V8::load(both + 8);
}
inline V8 from_uint32_8(const uint32_t* u) { return V8::map([&](int i) { return float(u[i]); }); }
inline float hsum(V8 a) {
  for (int step = 4; step; step >>= 1)
    for (int i = 0; i < step; i++) a.v[i] += a.v[i + step];
  return a.v[0];
}
inline float hmax(V8 a) {
  for (int step = 4; step; step >>= 1)
    for (int i = 0; i < step; i++) a.v[i] = a.v[i] > a.v[i + step] ? a.v[i] : a.v[i + step];
  return a.v[0];
}


struct B32 {
  uint8_t v[32];
  template <class F>
  static B32 map(F f) {
    B32 r;
    for (int i = 0; i < 32; i++) r.v[i] = uint8_t(f(i));
    return r;
  }
  static B32 load(const uint8_t* p) { return map([&](int i) { return p[i]; }); }
  friend B32 operator|(B32 a, B32 b) {
    return map([&](int i) { return a.v[i] | b.v[i]; });
  }
};
inline B32 low_nibbles(B32 a) { return B32::map([&](int i) { return a.v[i] & 15; }); }
inline B32 high_nibbles(B32 a) { return B32::map([&](int i) { return a.v[i] >> 4; }); }
inline B32 bits_above_nibble(B32 a, int at, int count) {
  return B32::map([&](int i) { return ((a.v[i] >> at) & ((1 << count) - 1)) << 4; });
}

struct I8 {
  int32_t v[8];
  static I8 set1(int32_t x) { return {{x, x, x, x, x, x, x, x}}; }
};
inline V8 to_float(I8 a) { return V8::map([&](int i) { return float(a.v[i]); }); }
template <class T>
inline V8 from_bytes_8(const T* p) {
  return V8::map([&](int i) { return float(p[i]); });
}
template <int kBits>
inline I8 dot4(I8 acc, B32 w, int32_t x) {
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 4; j++) acc.v[i] += int32_t(w.v[4 * i + j]) * int8_t(uint32_t(x) >> 8 * j);
  return acc;
}

}  // namespace llm42

#include "vec/halves.h"
