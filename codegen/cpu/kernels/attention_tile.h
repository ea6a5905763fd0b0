// Attention of a tile of query rows over one split of the keys (the order is stated in attention.h).
//
// Keys stand in units of 16, transposed, so that 16 keys are the lanes of a vector; values stand key by
// key, so that 16 dimensions are the lanes. Both products are then chains of fma per lane, and the number
// of rows a microkernel handles at once never shows in the bits. The microkernels are compiled once, for paged and
// for dense attention: attention_tile.cpp.
#pragma once
#include <algorithm>
#include <type_traits>

#include "element.h"
#include "parallel.h"

namespace llm42::attention {

inline constexpr int kSplit = 256;
inline constexpr int kUnit = 16;
inline constexpr int kUnits = kSplit / kUnit;
inline constexpr int kMicroRows = kLanes == 16 ? 12 : 6;
inline constexpr int kAccumulators = kLanes == 16 ? 24 : 12 * kLanes / 16;  // of type V16

// Lanes in the order that is cheapest to load; restore_lanes() puts them right.
template <class T>
inline V16 load_lanes(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) return V16::load_bf16_pairs(p);
  return load(p);
}
template <class T>
inline V16 restore_lanes(V16 a) {
  if constexpr (std::is_same_v<T, bf16>) return restore_bf16_pairs(a);
  return a;
}

// Key j of the split, dimension d: k[j / 16][d * k_stride + j % 16]; its value v[j / 16][j % 16 * v_stride + d].
// k_lines[u]: 16 * dim contiguous elements; those of all units together are the keys' memory.
template <class T>
struct SplitKV {
  const T *k[kUnits], *v[kUnits], *k_lines[kUnits];
  int64_t k_stride, v_stride;
};

// What scores of each dtype are made of: queries are kept as X, kSteps of them for kDepth dimensions.
template <class T>
struct Score {
  using X = float;
  static constexpr int kDepth = 1, kSteps = 1;
  static constexpr bool kFlush = false;

  static V16 broadcast(X x) { return V16::set1(x); }
  template <int Step>
  static V16 keys(const T* k, int64_t) {
    return load(k);
  }
  static void keep(const T* q, int64_t dim, X* out) { widen(q, dim, out); }
};
template <>
struct Score<bf16> {
  using X = PairX;
  static constexpr int kDepth = 2, kSteps = kPairSteps;
  static constexpr bool kFlush = kPairsByMode;

  static auto broadcast(X x) { return pair_factor(x); }
  template <int Step>
  static auto keys(const bf16* k, int64_t stride) {
    return pair_factor<Step>(k, k + stride);
  }
  static void keep(const bf16* q, int64_t dim, X* out) { keep_pairs(q, dim, out); }
};

// The keys of a split that a row sees: [lo, hi), and in them those whose bit is set.
struct Span {
  int lo = 0, hi = 0;
  bool empty() const { return lo >= hi; }
};

// Which keys inside their spans the rows of a microtile see, and what is added to their scores.
struct Mask {
  uint16_t visible[kMicroRows][kUnits];
  float bias[kMicroRows][kSplit];
  bool has_bias;
};

struct HeadShape {
  int64_t dim;
  float scale, softcap;

  // The output is kept as panels of 16 dimensions; the last one ends at `dim` and may overlap its
  // neighbour, whose elements it then computes a second time by the same chain.
  int64_t panels() const { return (dim + 15) / 16; }
  int64_t width() const { return panels() * 16; }
  int64_t panel_dim(int64_t panel) const { return std::max<int64_t>(0, std::min(panel * 16, dim - 16)); }
};

// How many of `rows` rows are handled at once: kMicroRows, and of what is left a number with a kernel.
inline int micro_rows(int rows) {
  if (rows >= kMicroRows) return kMicroRows;
  return rows >= 8 ? 8 : std::min(rows, 6);
}

// One split for `rows` rows, a number that micro_rows() gives: m[r], l[r] and o[r][width] (unnormalised) are
// overwritten. Meanwhile the split `ahead`, which is computed next, is fetched.
template <class T>
void attend(int rows, const HeadShape& h, const SplitKV<T>& kv, const SplitKV<T>& ahead,
            const typename Score<T>::X* q, const Span* spans, const Mask* mask, float* s, float* m, float* l, float* o);

// What one or several splits have given for a row.
struct Partial {
  float *m, *l, *o;
};

// into := into followed by `next`, which is the split (or splits) to its right.
inline void fold(const HeadShape& h, const Partial& into, const Partial& next) {
  const auto saw_nothing = [](const Partial& x) { return *x.m == -INFINITY && *x.l == 0.f; };
  if (saw_nothing(next)) return;
  if (saw_nothing(into)) {
    *into.m = *next.m, *into.l = *next.l;
    std::copy_n(next.o, h.width(), into.o);
    return;
  }
  const float m = std::max(*into.m, *next.m);
  const float a = exp_nonpositive(*into.m - m), b = exp_nonpositive(*next.m - m);
  *into.m = m;
  *into.l = *into.l * a + *next.l * b;
  const V16 va = V16::set1(a), vb = V16::set1(b);
  for (int64_t i = 0; i < h.width(); i += 16)
    fma(V16::load(into.o + i), va, V16::load(next.o + i) * vb).store(into.o + i);
}

// The normalised row; the sink (or null) is one more score, with no value. A row that saw nothing: 0.
template <class T>
inline void finish(const HeadShape& h, const Partial& row, const float* sink, T* out) {
  float l = *row.l, factor = 1.f;
  if (sink && l != 0.f) {
    const float m = std::max(*row.m, *sink);
    factor = exp_nonpositive(*row.m - m);
    l = l * factor + exp_nonpositive(*sink - m);
  }
  const V16 norm = V16::set1(factor / l);
  for (int64_t panel = 0; panel < h.panels(); panel++) {
    V16 y = V16::zero();  // l = 0: o was never written
    if (l != 0.f) y = restore_lanes<T>(fma(V16::load(row.o + panel * 16), norm, y));  // + 0 turns -0 into +0
    store_some(y, out + h.panel_dim(panel), h.dim);
  }
}

}  // namespace llm42::attention
