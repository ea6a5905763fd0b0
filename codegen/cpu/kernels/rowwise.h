// Operators on independent rows. Sums over a row: element i goes to lane i % 16 of sixteen fp32 partial
// sums, in ascending i; the lanes are then added in the fixed tree of hsum().
#pragma once
#include "element.h"

namespace llm42::rowwise {

// A matrix of `rows` rows of `cols` contiguous elements, rows `stride` elements apart.
struct Rows {
  const void* data;
  int64_t stride;
};

struct Norm {
  Dtype dtype;
  Rows x;
  Rows residual;       // data null: none
  const void* weight;   // [cols] or null
  const void* bias;     // [cols] or null (layer_norm)
  Dtype parameter_dtype;
  float eps;
  float weight_offset;
  bool cast_first;
  int64_t rows, cols;
  void* out;  // contiguous
  void* sum;  // contiguous, residual + x in dtype; used with a residual only
};

void rms_norm(const Norm& p, int threads);
void layer_norm(const Norm& p, int threads);

// x: [rows, 2*cols] = gate | up -> out: [rows, cols]
void silu_mul(Dtype dtype, Rows x, int64_t rows, int64_t cols, void* out, int threads);

struct Rotary {
  Dtype dtype;
  const void* x;  // [tokens, heads, dim], dim contiguous
  int64_t token_stride, head_stride;
  Rows cos, sin;  // [tokens, rotary_dim]
  int64_t tokens, heads, dim, rotary_dim;
  void* out;  // [tokens, heads, dim] contiguous
};
void rotary(const Rotary& p, int threads);

void row_sum(Dtype dtype, Rows x, int64_t rows, int64_t cols, void* out, int threads);
// out[i] = x[0] + ... + x[i] (or the product), one fp32 chain a row.
void running(Dtype dtype, Rows x, int64_t rows, int64_t cols, void* out, bool product, int threads);

void row_softmax(Dtype dtype, Rows x, int64_t rows, int64_t cols, void* out, bool log, int threads);

}  // namespace llm42::rowwise
