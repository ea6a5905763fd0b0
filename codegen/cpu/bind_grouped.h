// The grouped linear operator: rows are gathered by group, multiplied group by group, put back.
#pragma once
#include <cstring>
#include <vector>

#include "bind_linear.h"

namespace llm42::bind {

// The rows of each group, ascending: row numbers in `order`, group e at [start[e], start[e + 1]).
struct GroupedRows {
  std::vector<int64_t> order, start;

  GroupedRows(const Tensor& group, int64_t groups) : order(group.size(0)), start(groups + 1, 0) {
    const Tensor ids = group.contiguous();
    const int64_t* id = ids.const_data_ptr<int64_t>();
    const int64_t rows = ids.size(0);
    for (int64_t i = 0; i < rows; i++) {
      CHECK_VALUE(id[i] >= 0 && id[i] < groups, "grouped_linear: group ", id[i], " is outside of [0, ", groups, ")");
      start[id[i] + 1]++;
    }
    for (int64_t e = 0; e < groups; e++) start[e + 1] += start[e];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < rows; i++) order[next[id[i]]++] = i;
  }
};

inline Tensor grouped_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                 const Tensor& group, bool transposed) {
  const char* op = "grouped_linear";
  CHECK_VALUE(weight.dim() == 3, op, ": expected weight [E, N, K], got ", weight.sizes());
  const int64_t n = weight.size(transposed ? 2 : 1), k = weight.size(transposed ? 1 : 2), groups = weight.size(0);
  CHECK_VALUE(x.dim() == 2 && x.size(1) == k, op, ": expected x [R, ", k, "] for a weight ", weight.sizes(), ", got ",
              x.sizes());
  CHECK_VALUE(group.dim() == 1 && group.size(0) == x.size(0) && group.scalar_type() == kLong, op,
              ": expected group [", x.size(0), "] int64, got ", group.sizes(), " ", group.scalar_type());
  check_dtype(weight, x, op, "weight");
  Tensor biases;
  if (bias) {
    check_dtype(*bias, x, op, "bias");
    CHECK_VALUE(bias->dim() == 2 && bias->size(0) == groups && bias->size(1) == n, op, ": expected bias [", groups,
                ", ", n, "], got ", bias->sizes());
    biases = bias->contiguous();
  }
  const MatrixView rows = as_rows(x, op);
  const GroupedRows grouped(group, groups);
  const size_t size = x.element_size();
  const auto* source = static_cast<const char*>(rows.keep.const_data_ptr());
  Tensor gathered = empty({rows.rows, k}, x.scalar_type()), product = empty({rows.rows, n}, x.scalar_type());
  Tensor out = empty({rows.rows, n}, x.scalar_type());
  auto* in = static_cast<char*>(gathered.mutable_data_ptr());
  auto* made = static_cast<char*>(product.mutable_data_ptr());
  for (int64_t i = 0; i < rows.rows; i++)
    std::memcpy(in + i * k * size, source + grouped.order[i] * rows.stride * size, k * size);
  for (int64_t e = 0; e < groups; e++) {
    const int64_t first = grouped.start[e], count = grouped.start[e + 1] - first;
    if (count == 0) continue;
    gemm::Problem problem{};
    problem.dtype = dtype_of(x, op);
    problem.x = in + first * k * size;
    problem.x_stride = k;
    problem.dense = static_cast<const char*>(weight.const_data_ptr()) + e * weight.stride(0) * size;
    problem.stride_n = weight.stride(transposed ? 2 : 1);
    problem.stride_k = weight.stride(transposed ? 1 : 2);
    problem.bias = biases.defined() ? static_cast<const char*>(biases.const_data_ptr()) + e * n * size : nullptr;
    problem.out = made + first * n * size;
    problem.m = count;
    problem.n = n;
    problem.k = k;
    gemm::linear(problem, num_threads());
  }
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < rows.rows; i++)
    std::memcpy(target + grouped.order[i] * n * size, made + i * n * size, n * size);
  return out;
}

inline void register_grouped(Library& m) { m.impl("grouped_linear", TORCH_BOX(&grouped_linear)); }

}  // namespace llm42::bind
