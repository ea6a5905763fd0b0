// What kernels over tensors of fp32, bf16 or fp16 share: loops, choosing the type, ends of rows, rounding, SiLU.
#pragma once
#include <type_traits>
#include <utility>

#include "vec/math.h"

namespace llm42 {

// f(0), ..., f(N - 1) with constant arguments, so that arrays indexed by them become registers.
template <int N, class F>
[[gnu::always_inline]] inline void unrolled(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

enum class Dtype { f32, bf16, f16 };

// Calls f with a value of the storage type.
template <class F>
inline auto with_element(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

// min(n, 16) elements; the remaining lanes are `fill`.
template <class T>
inline V16 load_some(const T* p, int64_t n, float fill = 0.f) {
  if (n >= 16) return load(p);
  float x[16];
  for (int64_t i = 0; i < 16; i++) x[i] = i < n ? to_float(p[i]) : fill;
  return V16::load(x);
}

template <class T>
inline void store_some(V16 a, T* p, int64_t n) {
  if (n >= 16) return store(a, p);
  T part[16];
  store(a, part);
  std::memcpy(p, part, size_t(n) * sizeof(T));
}

// Rounded to T and back.
template <class T>
inline V16 round_to(V16 a) {
  T part[16];
  store(a, part);
  return load(part);
}
template <>
inline V16 round_to<float>(V16 a) {
  return a;
}

// n elements as fp32.
template <class T>
inline void widen(const T* p, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) store_some(load_some(p + i, n - i), out + i, n - i);
}

// n elements as the pairs of a chain of products, an odd n padded with zero.
inline void keep_pairs(const bf16* p, int64_t n, float* out) {
  widen(p, n, out);
  if (n % 2) out[n] = 0.f;
}
inline void keep_pairs(const bf16* p, int64_t n, bf16x2* out) {
  for (int64_t i = 0; i < n / 2; i++) out[i] = pair_of(p[2 * i], p[2 * i + 1]);
  if (n % 2) out[n / 2] = pair_of(p[n - 1], {});
}

inline V16 silu(V16 x) { return x / (V16::set1(1.f) + exp(V16::zero() - x)); }

// silu(gate) * up with the roundings of eager PyTorch: one after silu, the caller's after the product.
template <class T>
inline V16 silu_mul(V16 gate, V16 up) {
  return round_to<T>(silu(gate)) * up;
}

}  // namespace llm42
