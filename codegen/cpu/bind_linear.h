// Tensors in, pointers out: the linear operators (kernels/gemm.h).
#pragma once

#include "kernels/gemm.h"
#include "tensor.h"

namespace llm42::bind {

inline Dtype dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case kFloat:
      return Dtype::f32;
    case kBFloat16:
      return Dtype::bf16;
    case kHalf:
      return Dtype::f16;
    default:
      CHECK_TYPE(false, op, ": expected float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

// [..., K] as a matrix whose rows are contiguous; `keep` owns a copy if one is needed.
struct MatrixView {
  Tensor keep;
  int64_t rows, cols, stride;
};

inline MatrixView as_rows(const Tensor& x, const char* op) {
  CHECK_VALUE(x.dim() >= 1, op, ": expected at least one dimension, got a scalar");
  const int64_t cols = x.size(-1);
  if (x.dim() == 2 && (x.stride(1) == 1 || cols <= 1)) return {x, x.size(0), cols, x.stride(0)};
  const Tensor c = x.contiguous();
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < c.dim(); i++) rows *= c.size(i);
  return {c, rows, cols, cols};
}

inline void check_dtype(const Tensor& t, const Tensor& like, const char* op, const char* name) {
  CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": expected ", name, " of dtype ", like.scalar_type(),
                   " as x, got ", t.scalar_type());
}

inline Dims packed_sizes(Dtype dtype, int64_t n, int64_t k) {
  const int64_t panels = gemm::panel_count(n), width = gemm::panel_width();
  if (dtype == Dtype::bf16) return {panels, (k + 1) / 2, width, 2};
  return {panels, k, width};
}

inline Tensor linear_pack(const Tensor& weight) {
  CHECK_VALUE(weight.dim() == 2, "linear_pack: expected weight [N, K], got ", weight.sizes());
  const Dtype dtype = dtype_of(weight, "linear_pack");
  const int64_t n = weight.size(0), k = weight.size(1);
  Tensor packed = empty(packed_sizes(dtype, n, k), weight.scalar_type());
  gemm::pack(dtype, weight.const_data_ptr(), weight.stride(0), weight.stride(1), n, k, packed.mutable_data_ptr(),
             num_threads());
  return packed;
}

inline void check_not_negative(int64_t value, const char* op, const char* name) {
  CHECK_VALUE(value >= 0, op, ": ", name, " must not be negative, got ", value);
}

inline void check_packed(const Tensor& packed, int64_t n, int64_t k, const char* op) {
  check_not_negative(n, op, "n");
  check_not_negative(k, op, "k");
  const Dims sizes = packed_sizes(dtype_of(packed, op), n, k);
  CHECK_VALUE(same(packed.sizes(), sizes) && packed.is_contiguous(), op, ": expected linear_pack of a weight [", n,
                    ", ", k, "], that is a contiguous tensor ", IntArrayRef(sizes), ", got ", packed.sizes());
}

inline Tensor linear_unpack(const Tensor& packed, int64_t n, int64_t k) {
  check_packed(packed, n, k, "linear_unpack");
  Tensor weight = empty({n, k}, packed.scalar_type());
  gemm::unpack(dtype_of(packed, "linear_unpack"), packed.const_data_ptr(), n, k, weight.mutable_data_ptr(),
               num_threads());
  return weight;
}

// The part that all linear operators share: checks x and the bias, allocates the output.
struct LinearCall {
  gemm::Problem problem{};
  MatrixView x;
  Tensor bias, out;

  LinearCall(const char* op, const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias_,
             int64_t n, gemm::Order order = gemm::Order::chain)
      : x(as_rows(x_, op)) {
    check_not_negative(n, op, "n");
    check_dtype(weight, x_, op, "weight");
    if (bias_) {
      check_dtype(*bias_, x_, op, "bias");
      CHECK_VALUE(bias_->dim() == 1 && bias_->size(0) == n, op, ": expected bias [", n, "], got ",
                        bias_->sizes());
      bias = bias_->contiguous();
    }
    Dims sizes = dims_of(x_.sizes());
    sizes.back() = n;
    out = empty(sizes, x_.scalar_type());
    problem.dtype = dtype_of(x_, op);
    problem.order = order;
    CHECK_TYPE(order == gemm::Order::chain || problem.dtype == Dtype::bf16, op, ": expected bfloat16, got ",
               x_.scalar_type());
    problem.x = x.keep.const_data_ptr();
    problem.x_stride = x.stride;
    problem.packed = weight.const_data_ptr();
    problem.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
    problem.out = out.mutable_data_ptr();
    problem.m = x.rows;
    problem.n = n;
    problem.k = x.cols;
  }
};

// Each of the packed operators, and with `blocks` in its name in the order of blocks.
template <gemm::Order kOrder>
inline Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n) {
  const char* op = kOrder == gemm::Order::chain ? "linear" : "linear_blocks";
  LinearCall call(op, x, packed, bias, n, kOrder);
  check_packed(packed, n, call.x.cols, op);
  gemm::linear(call.problem, num_threads());
  return call.out;
}

inline Tensor linear_dense(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  CHECK_VALUE(weight.dim() == 2, "linear_dense: expected weight [N, K], got ", weight.sizes());
  LinearCall call("linear_dense", x, weight, bias, weight.size(0));
  CHECK_VALUE(weight.size(1) == call.x.cols, "linear_dense: expected x [..., ", weight.size(1), "] for a weight ",
                    weight.sizes(), ", got ", x.sizes());
  call.problem.dense = std::exchange(call.problem.packed, nullptr);
  call.problem.stride_n = weight.stride(0);
  call.problem.stride_k = weight.stride(1);
  gemm::linear(call.problem, num_threads());
  return call.out;
}

template <gemm::Order kOrder>
inline Tensor linear_silu_mul(const Tensor& x, const Tensor& packed, int64_t n) {
  const char* op = kOrder == gemm::Order::chain ? "linear_silu_mul" : "linear_silu_mul_blocks";
  LinearCall call(op, x, packed, std::nullopt, n, kOrder);
  check_packed(packed, 2 * n, call.x.cols, op);
  gemm::linear_silu_mul(call.problem, num_threads());
  return call.out;
}

template <gemm::Order kOrder>
inline Tensor linear_add(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                             const Tensor& residual, int64_t n) {
  const char* op = kOrder == gemm::Order::chain ? "linear_add" : "linear_add_blocks";
  LinearCall call(op, x, packed, bias, n, kOrder);
  check_packed(packed, n, call.x.cols, op);
  check_dtype(residual, x, op, "residual");
  CHECK_VALUE(same(residual.sizes(), call.out.sizes()), op, ": expected residual ", call.out.sizes(), ", got ",
                    residual.sizes());
  const MatrixView r = as_rows(residual, op);
  call.problem.residual = r.keep.const_data_ptr();
  call.problem.residual_stride = r.stride;
  gemm::linear(call.problem, num_threads());
  return call.out;
}

inline void register_linear(Library& m) {
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear_unpack", TORCH_BOX(&linear_unpack));
  m.impl("linear_dense", TORCH_BOX(&linear_dense));
  m.impl("linear", TORCH_BOX(&linear<gemm::Order::chain>));
  m.impl("linear_silu_mul", TORCH_BOX(&linear_silu_mul<gemm::Order::chain>));
  m.impl("linear_add", TORCH_BOX(&linear_add<gemm::Order::chain>));
  m.impl("linear_blocks", TORCH_BOX(&linear<gemm::Order::blocks>));
  m.impl("linear_silu_mul_blocks", TORCH_BOX(&linear_silu_mul<gemm::Order::blocks>));
  m.impl("linear_add_blocks", TORCH_BOX(&linear_add<gemm::Order::blocks>));
}

}  // namespace llm42::bind
