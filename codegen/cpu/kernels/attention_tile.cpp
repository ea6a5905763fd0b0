#include "attention_tile.h"

namespace llm42::attention {
namespace {

// Makes the compiler forget what it has read through p: it broadcasts again instead of running out of
// registers.
template <class T>
[[gnu::always_inline]] inline const T* reread(const T* p) {
  asm("" : "+r"(p));
  return p;
}

// Elements from p on, into the second-level cache.
template <class T, int Count>
[[gnu::always_inline]] inline void prefetch(const T* p) {
  for (int i = 0; i < Count; i += 64 / int(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// s[r][16 u + lane] = <q[r], key> for `Units` units of keys from `unit` on. Meanwhile the keys of the split
// `ahead`, which is computed next, are fetched.
template <class T, int Rows, int Units>
[[gnu::noinline]] void score_units(int64_t dim, const typename Score<T>::X* q, const SplitKV<T>& kv,
                                   const SplitKV<T>& ahead, int unit, float* s) {
  using S = Score<T>;
  V16 acc[Units][Rows];
  const T *key[Units], *next[Units];
  unrolled<Units>([&](auto u) {
    key[u] = kv.k[unit + u];
    next[u] = ahead.k_lines[unit + u];
    unrolled<Rows>([&](auto r) { acc[u][r] = V16::zero(); });
  });
  const int64_t length = dim / S::kDepth * S::kSteps;
  for (const auto* end = q + length; q < end; q += S::kSteps) {
    const auto* qd = q;
    unrolled<Units>([&](auto u) {
      prefetch<T, S::kDepth * kUnit>(next[u]);
      next[u] += S::kDepth * kUnit;
      unrolled<S::kSteps>([&](auto step) {
        const auto x = S::template keys<step>(key[u], kv.k_stride);
        qd = reread(qd);
        unrolled<Rows>([&](auto r) { acc[u][r] = fma(S::broadcast(qd[r * length + step]), x, acc[u][r]); });
      });
      key[u] += S::kDepth * kv.k_stride;
    });
  }
  unrolled<Units>([&](auto u) {
    unrolled<Rows>([&](auto r) { restore_lanes<T>(acc[u][r]).store(s + r * kSplit + (unit + u) * kUnit); });
  });
}

template <class T, int Rows>
inline void scores(const HeadShape& h, const SplitKV<T>& kv, const SplitKV<T>& ahead, const typename Score<T>::X* q,
                   int begin, int end, float* s) {
  constexpr int kWide = std::min(4, std::max(1, kAccumulators / Rows));
  const FloatMode<Score<T>::kFlush> mode;
  int u = begin;
  for (; u + kWide <= end; u += kWide) score_units<T, Rows, kWide>(h.dim, q, kv, ahead, u, s);
  if constexpr (kWide > 2)
    for (; u + 2 <= end; u += 2) score_units<T, Rows, 2>(h.dim, q, kv, ahead, u, s);
  if constexpr (kWide > 1)
    for (; u < end; u++) score_units<T, Rows, 1>(h.dim, q, kv, ahead, u, s);
}

inline void hide(float* s, const Span& span, const uint16_t* visible) {
  for (int j = span.lo & ~15; j < span.lo; j++) s[j] = -INFINITY;
  for (int j = span.hi; j & 15; j++) s[j] = -INFINITY;
  if (!visible) return;
  for (int u = span.lo / kUnit; u * kUnit < span.hi; u++)
    for (int j = 0; visible[u] != 0xffff && j < kUnit; j++)
      if (!(visible[u] >> j & 1)) s[u * kUnit + j] = -INFINITY;
}

// Products to exponentials of scores, in place; m: their maximum, l: their sum. A row that sees nothing: -inf
// and 0.
inline void softmax(const HeadShape& h, float* s, const Span& span, const uint16_t* visible, const float* bias,
                    float& m, float& l) {
  const int begin = span.lo & ~15, end = (span.hi + 15) & ~15;
  const V16 scale = V16::set1(h.scale), cap = V16::set1(h.softcap);
  for (int j = begin; j < end; j += 16) {
    V16 x = V16::load(s + j) * scale;
    if (h.softcap > 0.f) x = cap * tanh(x / cap);
    if (bias) x = x + V16::load(bias + j);
    x.store(s + j);
  }
  hide(s, span, visible);
  V16 top = V16::set1(-INFINITY);
  for (int j = begin; j < end; j += 16) top = max(V16::load(s + j), top);  // passes over NaN: it comes back below
  m = hmax(top);
  const V16 base = V16::set1(m == -INFINITY ? 0.f : m);
  V16 sum = V16::zero();
  for (int j = begin; j < end; j += 16) {
    const V16 p = exp_nonpositive(V16::load(s + j) - base);
    p.store(s + j);
    sum = sum + p;
  }
  l = hsum(sum);
}

// o[r][panel] += sum of p[r][j] * value j over j in [begin, end), for `Panels` panels from `panel` on. Meanwhile
// the values of the split `ahead` are fetched.
template <class T, int Rows, int Panels>
[[gnu::noinline]] void add_values_panels(const HeadShape& h, const SplitKV<T>& kv, const SplitKV<T>& ahead,
                                         const float* p, int begin, int end, int64_t panel, float* o) {
  const int64_t width = h.width(), stride = kv.v_stride;
  o += panel * 16;
  int64_t dim[Panels];
  V16 acc[Panels][Rows];
  unrolled<Panels>([&](auto n) {
    dim[n] = h.panel_dim(panel + n);
    unrolled<Rows>([&](auto r) { acc[n][r] = V16::load(o + r * width + n * 16); });
  });
  for (int j = begin; j < end;) {
    const T* v = kv.v[j / kUnit] + (j % kUnit) * stride;
    const T* next = ahead.v[j / kUnit] + (j % kUnit) * stride + dim[0];
    for (const int stop = std::min(end, (j | 15) + 1); j < stop; j++, v += stride, next += stride) {
      prefetch<T, Panels * 16>(next);
      const float* pj = p + j;
      unrolled<Panels>([&](auto n) {
        const V16 x = load_lanes<T>(v + dim[n]);
        pj = reread(pj);
        unrolled<Rows>([&](auto r) { acc[n][r] = fma(V16::set1(pj[r * kSplit]), x, acc[n][r]); });
      });
    }
  }
  unrolled<Panels>([&](auto n) {
    unrolled<Rows>([&](auto r) { acc[n][r].store(o + r * width + n * 16); });
  });
}

template <class T, int Rows>
inline void add_values(const HeadShape& h, const SplitKV<T>& kv, const SplitKV<T>& ahead, const float* p, int begin,
                       int end, float* o) {
  constexpr int kWide = std::min(4, std::max(1, kAccumulators / Rows));
  int64_t panel = 0;
  for (; panel + kWide <= h.panels(); panel += kWide)
    add_values_panels<T, Rows, kWide>(h, kv, ahead, p, begin, end, panel, o);
  if constexpr (kWide > 1)
    for (; panel < h.panels(); panel++) add_values_panels<T, Rows, 1>(h, kv, ahead, p, begin, end, panel, o);
}

// Row by row where the spans differ, all rows at once where they agree; keys ascend for every row.
template <class T, int Rows>
inline void add_spans(const HeadShape& h, const SplitKV<T>& kv, const SplitKV<T>& ahead, const float* p,
                      const Span* spans, float* o) {
  int lo = 0, hi = kSplit;
  for (int r = 0; r < Rows; r++) lo = std::max(lo, spans[r].lo), hi = std::min(hi, spans[r].hi);
  if (lo >= hi) lo = hi = kSplit;
  const auto one_row = [&](int r, int begin, int end) {
    if (begin < end) add_values<T, 1>(h, kv, ahead, p + r * kSplit, begin, end, o + r * h.width());
  };
  for (int r = 0; r < Rows; r++) one_row(r, spans[r].lo, std::min(spans[r].hi, lo));
  if (lo < hi) add_values<T, Rows>(h, kv, ahead, p, lo, hi, o);
  for (int r = 0; r < Rows; r++) one_row(r, std::max(spans[r].lo, hi), spans[r].hi);
}

// Like add_spans, with masks that have holes: whole units at once where every row sees all 16 keys.
template <class T, int Rows>
inline void add_masked(const HeadShape& h, const SplitKV<T>& kv, const SplitKV<T>& ahead, const float* p,
                       const Mask& mask, float* o) {
  for (int u = 0; u < kUnits;) {
    const auto full = [&](int unit) {
      uint16_t all = 0xffff;
      for (int r = 0; r < Rows; r++) all &= mask.visible[r][unit];
      return all == 0xffff;
    };
    int end = u;
    while (end < kUnits && full(end)) end++;
    if (end > u) add_values<T, Rows>(h, kv, ahead, p, u * kUnit, end * kUnit, o);
    if (end == kUnits) break;
    for (int r = 0; r < Rows; r++)
      for (int j = 0; j < kUnit; j++) {
        int stop = j;
        while (stop < kUnit && mask.visible[r][end] >> stop & 1) stop++;
        if (stop > j)
          add_values<T, 1>(h, kv, ahead, p + r * kSplit, end * kUnit + j, end * kUnit + stop, o + r * h.width());
        j = stop;
      }
    u = end + 1;
  }
}

// One split for `Rows` rows: m[r], l[r] and o[r][width] (unnormalised) are overwritten.
template <class T, int Rows>
inline void attend_rows(const HeadShape& h, const SplitKV<T>& kv, const SplitKV<T>& ahead,
                        const typename Score<T>::X* q, const Span* spans, const Mask* mask, float* s, float* m, float* l, float* o) {
  int lo = kSplit, hi = 0;
  for (int r = 0; r < Rows; r++)
    if (!spans[r].empty()) lo = std::min(lo, spans[r].lo), hi = std::max(hi, spans[r].hi);
  if (lo < hi) scores<T, Rows>(h, kv, ahead, q, lo / kUnit, (hi + 15) / kUnit, s);
  for (int r = 0; r < Rows; r++) {
    const uint16_t* visible = mask ? mask->visible[r] : nullptr;
    const float* bias = mask && mask->has_bias ? mask->bias[r] : nullptr;
    softmax(h, s + r * kSplit, spans[r], visible, bias, m[r], l[r]);
  }
  std::fill_n(o, Rows * h.width(), 0.f);
  if (mask)
    add_masked<T, Rows>(h, kv, ahead, s, *mask, o);
  else
    add_spans<T, Rows>(h, kv, ahead, s, spans, o);
}

}  // namespace

template <class T>
void attend(int rows, const HeadShape& h, const SplitKV<T>& kv, const SplitKV<T>& ahead,
            const typename Score<T>::X* q, const Span* spans, const Mask* mask, float* s, float* m, float* l, float* o) {
  switch (rows) {
    case 1: return attend_rows<T, 1>(h, kv, ahead, q, spans, mask, s, m, l, o);
    case 2: return attend_rows<T, 2>(h, kv, ahead, q, spans, mask, s, m, l, o);
    case 3: return attend_rows<T, 3>(h, kv, ahead, q, spans, mask, s, m, l, o);
    case 4: return attend_rows<T, 4>(h, kv, ahead, q, spans, mask, s, m, l, o);
    case 5: return attend_rows<T, 5>(h, kv, ahead, q, spans, mask, s, m, l, o);
    case 6: return attend_rows<T, 6>(h, kv, ahead, q, spans, mask, s, m, l, o);
    case 8:
      if constexpr (kMicroRows > 8) return attend_rows<T, 8>(h, kv, ahead, q, spans, mask, s, m, l, o);
      [[fallthrough]];
    default: return attend_rows<T, kMicroRows>(h, kv, ahead, q, spans, mask, s, m, l, o);
  }
}

#define LLM42_ATTEND(T)                                                                                         \
  template void attend(int, const HeadShape&, const SplitKV<T>&, const SplitKV<T>&, const typename Score<T>::X*, \
                       const Span*, const Mask*, float*, float*, float*, float*);
LLM42_ATTEND(float)
LLM42_ATTEND(bf16)
LLM42_ATTEND(f16)
#undef LLM42_ATTEND

}  // namespace llm42::attention
