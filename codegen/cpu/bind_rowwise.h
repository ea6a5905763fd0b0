// Tensors in, pointers out: norms, activations, rotary embedding and row reductions (kernels/rowwise.h).
#pragma once
#include "bind_linear.h"
#include "kernels/rowwise.h"

namespace llm42::bind {

inline Tensor empty_like_rows(const Tensor& x, int64_t cols) {
  Dims sizes = dims_of(x.sizes());
  sizes.back() = cols;
  return empty(sizes, x.scalar_type());
}

inline Tensor norm_parameter(const std::optional<Tensor>& p, const MatrixView& x, const char* op,
                                 const char* name) {
  if (!p) return {};
  CHECK_VALUE(p->dim() == 1 && p->size(0) == x.cols, op, ": expected ", name, " [", x.cols, "], got ",
                    p->sizes());
  CHECK_TYPE(p->scalar_type() == x.keep.scalar_type() || p->scalar_type() == kFloat, op, ": expected ", name,
                   " of dtype ", x.keep.scalar_type(), " (as x) or float32, got ", p->scalar_type());
  return p->contiguous();
}

inline rowwise::Rows rows_of(const MatrixView& x) { return {x.keep.const_data_ptr(), x.stride}; }

inline rowwise::Norm norm_call(const MatrixView& x, const Tensor& weight, double eps, const Tensor& out,
                               const char* op) {
  rowwise::Norm p{};
  p.dtype = dtype_of(x.keep, op);
  p.x = rows_of(x);
  p.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  p.parameter_dtype = weight.defined() ? dtype_of(weight, op) : p.dtype;
  p.eps = float(eps);
  p.rows = x.rows;
  p.cols = x.cols;
  p.out = out.mutable_data_ptr();
  return p;
}

inline Tensor rms_norm_weight(const std::optional<Tensor>& weight, const MatrixView& x, bool cast_first,
                                  const char* op) {
  const Tensor w = norm_parameter(weight, x, op, "weight");
  CHECK_TYPE(!cast_first || !w.defined() || w.scalar_type() == x.keep.scalar_type(), op,
                   ": with cast_first, expected weight of dtype ", x.keep.scalar_type(), " (as x), got ",
                   w.scalar_type());
  return w;
}

inline Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps,
                           double weight_offset, bool cast_first) {
  const MatrixView view = as_rows(x, "rms_norm");
  const Tensor w = rms_norm_weight(weight, view, cast_first, "rms_norm");
  const Tensor out = empty_like_rows(x, view.cols);
  rowwise::Norm p = norm_call(view, w, eps, out, "rms_norm");
  p.weight_offset = float(weight_offset);
  p.cast_first = cast_first;
  rowwise::rms_norm(p, num_threads());
  return out;
}

inline std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                                       const std::optional<Tensor>& weight, double eps,
                                                       double weight_offset, bool cast_first) {
  const MatrixView view = as_rows(x, "add_rms_norm");
  check_dtype(residual, x, "add_rms_norm", "residual");
  CHECK_VALUE(same(residual.sizes(), x.sizes()), "add_rms_norm: expected residual ", x.sizes(), " as x, got ",
                    residual.sizes());
  const MatrixView r = as_rows(residual, "add_rms_norm");
  const Tensor w = rms_norm_weight(weight, view, cast_first, "add_rms_norm");
  const Tensor out = empty_like_rows(x, view.cols), sum = empty_like_rows(x, view.cols);
  rowwise::Norm p = norm_call(view, w, eps, out, "add_rms_norm");
  p.residual = rows_of(r);
  p.sum = sum.mutable_data_ptr();
  p.weight_offset = float(weight_offset);
  p.cast_first = cast_first;
  rowwise::rms_norm(p, num_threads());
  return {out, sum};
}

inline Tensor layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, double eps) {
  const MatrixView view = as_rows(x, "layer_norm");
  const Tensor w = norm_parameter(weight, view, "layer_norm", "weight");
  const Tensor b = norm_parameter(bias, view, "layer_norm", "bias");
  CHECK_TYPE(!w.defined() || !b.defined() || w.scalar_type() == b.scalar_type(),
                   "layer_norm: expected weight and bias of one dtype, got ",
                   w.defined() ? w.scalar_type() : kFloat, " and ", b.defined() ? b.scalar_type() : kFloat);
  const Tensor out = empty_like_rows(x, view.cols);
  rowwise::Norm p = norm_call(view, w.defined() ? w : b, eps, out, "layer_norm");
  p.weight = w.defined() ? w.const_data_ptr() : nullptr;
  p.bias = b.defined() ? b.const_data_ptr() : nullptr;
  rowwise::layer_norm(p, num_threads());
  return out;
}

inline Tensor silu_mul(const Tensor& x) {
  const MatrixView view = as_rows(x, "silu_mul");
  CHECK_VALUE(view.cols % 2 == 0, "silu_mul: expected x [..., 2 * I] = gate | up, got ", x.sizes());
  const Tensor out = empty_like_rows(x, view.cols / 2);
  rowwise::silu_mul(dtype_of(x, "silu_mul"), rows_of(view), view.rows, view.cols / 2, out.mutable_data_ptr(),
                    num_threads());
  return out;
}

inline MatrixView rotary_table(const Tensor& table, const Tensor& x, const char* name) {
  check_dtype(table, x, "rotary", name);
  const bool fits = table.dim() == 2 && table.size(0) == x.size(0) && table.size(1) <= x.size(2);
  CHECK_VALUE(fits && table.size(1) % 2 == 0, "rotary: expected ", name, " [T, R] with T = ", x.size(0),
                    " and even R <= ", x.size(2), ", got ", table.sizes());
  return as_rows(table, "rotary");
}

inline Tensor rotary(const Tensor& x_, const Tensor& cos_, const Tensor& sin_) {
  CHECK_VALUE(x_.dim() == 3, "rotary: expected x [T, H, D], got ", x_.sizes());
  CHECK_VALUE(same(cos_.sizes(), sin_.sizes()), "rotary: expected cos and sin of one shape, got ", cos_.sizes(),
                    " and ", sin_.sizes());
  const Tensor x = x_.stride(2) == 1 ? x_ : x_.contiguous();
  const MatrixView cos = rotary_table(cos_, x, "cos"), sin = rotary_table(sin_, x, "sin");
  const Tensor out = empty_like_rows(x, x.size(2));
  rowwise::Rotary p{};
  p.dtype = dtype_of(x, "rotary");
  p.x = x.const_data_ptr();
  p.token_stride = x.stride(0);
  p.head_stride = x.stride(1);
  p.cos = rows_of(cos);
  p.sin = rows_of(sin);
  p.tokens = x.size(0);
  p.heads = x.size(1);
  p.dim = x.size(2);
  p.rotary_dim = cos.cols;
  p.out = out.mutable_data_ptr();
  rowwise::rotary(p, num_threads());
  return out;
}

// Dimensions to reduce, made the trailing ones; the kept sizes (ones where keepdim) are in `out_sizes`.
inline Tensor trailing(const Tensor& x, IntArrayRef dims, bool keepdim, Dims& out_sizes,
                           int64_t& cols) {
  std::vector<bool> reduced(size_t(x.dim()), dims.empty());
  for (int64_t d : dims) {
    CHECK_VALUE(d >= -x.dim() && d < x.dim(), "row_sum: expected dim in [", -x.dim(), ", ", x.dim() - 1,
                      "], got ", d);
    CHECK_VALUE(!reduced[size_t(d < 0 ? d + x.dim() : d)], "row_sum: dim ", d, " appears twice in ", dims);
    reduced[size_t(d < 0 ? d + x.dim() : d)] = true;
  }
  std::vector<int64_t> order, last;
  cols = 1;
  for (int64_t d = 0; d < x.dim(); d++) {
    if (reduced[size_t(d)]) {
      last.push_back(d);
      cols *= x.size(d);
      if (keepdim) out_sizes.push_back(1);
    } else {
      order.push_back(d);
      out_sizes.push_back(x.size(d));
    }
  }
  order.insert(order.end(), last.begin(), last.end());
  return x.permute(order).contiguous();
}

inline Tensor row_sum(const Tensor& x, IntArrayRef dims, bool keepdim) {
  const Dtype dtype = dtype_of(x, "row_sum");
  Dims sizes;
  int64_t cols;
  const Tensor rows = trailing(x, dims, keepdim, sizes, cols);
  const Tensor out = empty(sizes, x.scalar_type());
  rowwise::row_sum(dtype, {rows.const_data_ptr(), cols}, out.numel(), cols, out.mutable_data_ptr(),
                   num_threads());
  return out;
}

inline Tensor softmax_of(const Tensor& x, bool log, const char* op) {
  const MatrixView view = as_rows(x, op);
  const Tensor out = empty_like_rows(x, view.cols);
  rowwise::row_softmax(dtype_of(x, op), rows_of(view), view.rows, view.cols, out.mutable_data_ptr(), log,
                       num_threads());
  return out;
}

inline Tensor row_softmax(const Tensor& x) { return softmax_of(x, false, "row_softmax"); }
inline Tensor row_log_softmax(const Tensor& x) { return softmax_of(x, true, "row_log_softmax"); }

inline Tensor running(const Tensor& x, int64_t dim, bool product, const char* op) {
  const Dtype dtype = dtype_of(x, op);
  CHECK_VALUE(dim >= -x.dim() && dim < x.dim(), op, ": expected dim in [", -x.dim(), ", ", x.dim() - 1, "], got ",
                    dim);
  const Tensor rows = x.movedim(dim, -1).contiguous();
  const Tensor out = empty(rows.sizes(), x.scalar_type());
  const int64_t cols = rows.size(-1);
  if (out.numel() > 0)
    rowwise::running(dtype, {rows.const_data_ptr(), cols}, out.numel() / cols, cols, out.mutable_data_ptr(), product,
                     num_threads());
  return out.movedim(-1, dim).contiguous();
}

inline Tensor running_sum(const Tensor& x, int64_t dim) { return running(x, dim, false, "running_sum"); }
inline Tensor running_product(const Tensor& x, int64_t dim) { return running(x, dim, true, "running_product"); }

inline void register_rowwise(Library& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("row_sum", TORCH_BOX(&row_sum));
  m.impl("running_sum", TORCH_BOX(&running_sum));
  m.impl("running_product", TORCH_BOX(&running_product));
  m.impl("row_softmax", TORCH_BOX(&row_softmax));
  m.impl("row_log_softmax", TORCH_BOX(&row_log_softmax));
}

}  // namespace llm42::bind
