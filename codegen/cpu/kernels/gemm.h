// y = x · wᵀ, every output element in one of the orders of products.
#pragma once
#include "element.h"

namespace llm42::gemm {

int64_t panel_width();
int64_t panel_count(int64_t n);

// weight [n, k] at the given strides (in elements) <-> packed [panel_count, k, panel_width], for bf16
// [panel_count, ceil(k / 2), panel_width, 2], where what the weight does not have is zero.
void pack(Dtype dtype, const void* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k, void* packed,
          int threads);
void unpack(Dtype dtype, const void* packed, int64_t n, int64_t k, void* weight, int threads);

enum class Order { chain, blocks };  // fma-chain, two-chains32 (of bf16)

struct Problem {
  Dtype dtype;
  Order order;
  const void* x;  // [m, k], rows x_stride elements apart
  int64_t x_stride;
  const void* packed;  // or null: `dense` [n, k] at these strides
  const void* dense;
  int64_t stride_n, stride_k;
  const void* bias;      // [n] or null
  const void* residual;  // [m, n] with rows residual_stride apart, or null
  int64_t residual_stride;
  void* out;  // [m, n] contiguous
  int64_t m, n, k;
};

// out = x · wᵀ (+ bias) in fp32, rounded to dtype once; a residual is then added in dtype.
void linear(const Problem& p, int threads);

// The weight holds gate's n rows, then up's; out: [m, n] = silu(gate) * up, rounded after each step.
void linear_silu_mul(const Problem& p, int threads);

}  // namespace llm42::gemm
