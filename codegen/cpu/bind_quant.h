// Tensors in, pointers out: products with quantised weights and rows of them (kernels/quant.h).
#pragma once
#include "bind_linear.h"
#include "kernels/quant.h"

namespace llm42::bind {

inline quant::Segment quantised(const Tensor& packed, std::string_view format, int64_t n, int64_t k,
                                const char* op) {
  const quant::Layout* layout = quant::layout_of(format);
  CHECK_VALUE(layout, op, ": no kernel for weights of format '", std::string(format), "'");
  check_not_negative(n, op, "n");
  CHECK_VALUE(k % layout->block == 0, op, ": rows of ", k, " values are no multiple of the ", layout->block,
                    " of a block of ", std::string(format));
  CHECK_TYPE(packed.scalar_type() == kByte, op, ": expected packed weights of dtype uint8, got ",
                   packed.scalar_type());
  CHECK_VALUE(packed.dim() == 3 && packed.size(0) == quant::panel_count(n) &&
                    packed.size(1) == k / layout->block && packed.size(2) == layout->bytes && packed.is_contiguous(),
                    op, ": expected a weight [", n, ", ", k, "] of format ", std::string(format),
                    " packed as a contiguous tensor [", quant::panel_count(n), ", ", k / layout->block, ", ",
                    layout->bytes, "], got ", packed.sizes());
  return {layout, packed.const_data_ptr<uint8_t>(), n};
}

inline Tensor linear_q(const Tensor& x, const std::vector<Tensor>& packed, const Text& formats,
                           IntArrayRef sizes, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual, bool gated) {
  const char* op = "linear_q";
  quant::Problem p{};
  const MatrixView view = as_rows(x, op);
  std::string_view names = formats.value;
  CHECK_VALUE(!sizes.empty() && sizes.size() == packed.size(), op, ": expected a size for each of the ",
                    packed.size(), " weights, got ", sizes.size());
  for (size_t i = 0; i < packed.size(); i++) {
    const size_t end = std::min(names.find(','), names.size());
    p.segments.push_back(quantised(packed[i], names.substr(0, end), sizes[i], view.cols, op));
    names.remove_prefix(std::min(end + 1, names.size()));
    p.n += sizes[i];
  }
  CHECK_VALUE(names.empty(), op, ": more formats than weights in '", formats.value, "'");
  CHECK_VALUE(!gated || (sizes.size() == 2 && sizes[0] == sizes[1] && !bias && !residual), op,
                    ": gated takes two weights of one size, and neither bias nor residual");
  if (gated) p.n = sizes[0];
  Dims shape = dims_of(x.sizes());
  shape.back() = p.n;
  const Tensor out = empty(shape, x.scalar_type());
  Tensor added;
  MatrixView r{};
  if (bias) {
    check_dtype(*bias, x, op, "bias");
    CHECK_VALUE(bias->dim() == 1 && bias->size(0) == p.n, op, ": expected bias [", p.n, "], got ", bias->sizes());
    added = bias->contiguous();
    p.bias = added.const_data_ptr();
  }
  if (residual) {
    check_dtype(*residual, x, op, "residual");
    CHECK_VALUE(same(residual->sizes(), out.sizes()), op, ": expected residual ", out.sizes(), ", got ",
                      residual->sizes());
    r = as_rows(*residual, op);
    p.residual = r.keep.const_data_ptr();
    p.residual_stride = r.stride;
  }
  p.dtype = dtype_of(x, op);
  p.x = view.keep.const_data_ptr();
  p.x_stride = view.stride;
  p.m = view.rows;
  p.k = view.cols;
  p.gated = gated;
  p.out = out.mutable_data_ptr();
  quant::linear(p, num_threads());
  return out;
}

inline Tensor embedding_q(const Tensor& ids, const Tensor& packed, const Text& format, int64_t n,
                              int64_t k, ScalarType dtype) {
  const char* op = "embedding_q";
  CHECK_TYPE(ids.scalar_type() == kLong || ids.scalar_type() == kInt, op,
                   ": expected ids of dtype int64 or int32, got ", ids.scalar_type());
  const quant::Segment weight = quantised(packed, format.value, n, k, op);
  const Tensor index = ids.to(kLong).contiguous();
  const int64_t* first = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); i++)
    CHECK_INDEX(first[i] >= 0 && first[i] < n, op, ": index ", first[i], " is out of range for ", n, " rows");
  Dims shape = dims_of(ids.sizes());
  shape.push_back(k);
  const Tensor out = empty(shape, dtype);
  quant::rows(weight, k, first, index.numel(), dtype_of(out, op), out.mutable_data_ptr(), num_threads());
  return out;
}

inline void register_quant(Library& m) {
  m.impl("linear_q", TORCH_BOX(&linear_q));
  m.impl("embedding_q", TORCH_BOX(&embedding_q));
}

}  // namespace llm42::bind
