// Links of a chain of bf16 products by the ordinary fused multiply-add; included inside of the namespace.
using LinkX = float;
inline constexpr bool kLinksByMode = true;
inline Vec link_factor(LinkX x) { return Vec::set1(x); }
inline Vec link_factor(Vec x) { return x; }
template <int Step>
inline Vec link_factor(const bf16x2* p) {
  return Step ? Vec::load_low(p) : Vec::load_high(p);
}
inline Vec sum_of_chains(Vec a, Vec b) { return a + b; }
