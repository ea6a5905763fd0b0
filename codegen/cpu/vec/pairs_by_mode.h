// Chains of bf16 products by the ordinary fused multiply-add; included inside of the namespace.
using PairX = float;
inline constexpr int kPairSteps = 2;
inline constexpr bool kPairsByMode = true;
inline Vec pair_factor(PairX x) { return Vec::set1(x); }
inline Vec pair_factor(Vec x) { return x; }
template <int Step>
inline Vec pair_factor(const bf16x2* p) {
  return Step ? Vec::load_low(p) : Vec::load_high(p);
}
