// Elementary functions on V16, the same bits everywhere.
#pragma once
#include "vec.h"

namespace llm42 {

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
