// Vectors with identical semantics on every instruction set: the one place where it shows.
//
// V16   sixteen fp32 lanes
// Vec   as many fp32 lanes as a register has: kLanes of them; there are kRegisters registers.
//       kPlain: lanes are a loop, so that large tiles would gain nothing and take compilers minutes
// W8    eight words of 32 bits
// B64   64 bytes, and I16 sixteen 32-bit integers, for products of bytes
//
// Chains of products of bf16 numbers take them in pairs, and denormals for zero (docs/orders.md). x is kept as
// kPairSteps values of type PairX for each pair, and
//
//   acc = fma(pair_factor(x[step]), pair_factor<step>(pairs), acc)    for each step, ascending
//
// is the chain, in the Vec acc; pair_factor<step>(row, row) is for a V16 and pairs that stand in two rows.
// link_factor() takes a pair's elements one at a time, for a chain over every second k, and sum_of_chains() adds
// two of these. Where kPairsByMode, or kLinksByMode, the thread has to be in FlushMode (kernels/parallel.h).
//
// Every kernel is written in terms of these, so the bits of a result do not depend on whether it runs on
// AVX-512, AVX2 or anything else: each lane operation is one correctly rounded IEEE operation, and
// horizontal sums have one fixed tree. Contraction is switched off in the build; fma() is the only FMA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512FP16__)
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
#if defined(__AVX512FP16__)  // GCC takes loops of float(_Float16(f)) for loops of f there
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
  _Float16 x = _Float16(f);
  uint16_t h;
  std::memcpy(&h, &x, 2);
  return h;
#endif
}

// Storage types of tensors, so that kernels can be templates over them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// Two bf16 numbers that follow one another in a chain of products: the first stands in the high half.
struct bf16x2 {
  uint32_t bits;
};
inline bf16x2 pair_of(bf16 first, bf16 second) { return {uint32_t(first.bits) << 16 | second.bits}; }
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

}  // namespace llm42

#if !defined(LLM42_GENERIC_VEC) && defined(__AVX512F__) && defined(__AVX512BW__)
#include "vec/avx512.h"
#elif !defined(LLM42_GENERIC_VEC) && defined(__AVX2__) && defined(__FMA__)
#include "vec/avx2.h"
#else
#include "vec/portable.h"
#endif

namespace llm42 {

template <class T>
inline V16 load(const T* p) {
  return V16::load(p);
}
template <class T>
inline void store(V16 a, T* p) {
  a.store(p);
}

}  // namespace llm42
