// y = x · wᵀ for quantised w, and rows of it: integer sums in every group, which are exact, folded in order.
#pragma once
#include <string_view>
#include <vector>

#include "element.h"

namespace llm42::quant {

// How a format lies in memory; null for an unknown name.
struct Layout {
  std::string_view name;
  int64_t block, bytes;  // values of k in a block, and its bytes for a panel of sixteen columns
};
const Layout* layout_of(std::string_view name);

int64_t panel_count(int64_t n);

struct Segment {
  const Layout* layout;
  const uint8_t* packed;  // [panel_count(n), k / block, bytes]
  int64_t n;
};

struct Problem {
  Dtype dtype;
  const void* x;  // [m, k], rows x_stride elements apart
  int64_t x_stride, m, k;
  std::vector<Segment> segments;  // side by side; if `gated`, the two are gate and up
  bool gated;
  const void* bias;      // [n] or null
  const void* residual;  // [m, n] with rows residual_stride apart, or null
  int64_t residual_stride;
  void* out;  // [m, n] contiguous
  int64_t n;  // of the output
};

void linear(const Problem& p, int threads);

// out[i, :] = row ids[i] of the weight in fp32, rounded to dtype once; the ids are in range.
void rows(const Segment& weight, int64_t k, const int64_t* ids, int64_t count, Dtype dtype, void* out, int threads);

}  // namespace llm42::quant
