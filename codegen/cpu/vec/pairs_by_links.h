// A pair is two links, one after the other; included inside of the namespace.
using PairX = LinkX;
inline constexpr int kPairSteps = 2;
inline constexpr bool kPairsByMode = kLinksByMode;
inline auto pair_factor(PairX x) { return link_factor(x); }
inline auto pair_factor(Vec x) { return link_factor(x); }
template <int Step>
inline auto pair_factor(const bf16x2* p) {
  return link_factor<Step>(p);
}
