// RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450) over the last dimension.
#include <cmath>

#include "parallel.h"
#include "rowwise.h"

namespace llm42::rowwise {

namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

struct RowScratch;
struct WeightScratch;
struct BiasScratch;

int64_t padded(int64_t cols) { return (cols + 15) / 16 * 16; }

// The row in fp32, padded with zeros to whole vectors. With a residual: residual + x, rounded to T as the
// eager addition is, and written to p.sum.
template <class T>
void load_row(const Norm& p, int64_t row, float* out) {
  const T* x = static_cast<const T*>(p.x.data) + row * p.x.stride;
  const T* residual = static_cast<const T*>(p.residual.data);
  for (int64_t i = 0; i < p.cols; i += 16) {
    V16 v = load_some(x + i, p.cols - i);
    if (residual) {
      v = round_to<T>(load_some(residual + row * p.residual.stride + i, p.cols - i) + v);
      store_some(v, static_cast<T*>(p.sum) + row * p.cols + i, p.cols - i);
    }
    v.store(out + i);
  }
}

// Weight or bias in fp32, padded to whole vectors; null stays null.
template <class Tag>
float* widen_parameter(const Norm& p, const void* data) {
  if (!data) return nullptr;
  float* out = scratch<Tag>(padded(p.cols));
  with_element(p.parameter_dtype, [&]<class T>(T) { widen(static_cast<const T*>(data), p.cols, out); });
  std::fill(out + p.cols, out + padded(p.cols), 0.f);
  return out;
}

template <class T>
void rms_norm_row(const Norm& p, const float* weight, int64_t row) {
  float* x = scratch<RowScratch>(padded(p.cols));
  load_row<T>(p, row, x);
  V16 squares = V16::zero();
  for (int64_t i = 0; i < p.cols; i += 16) {
    const V16 v = V16::load(x + i);
    squares = fma(v, v, squares);
  }
  const V16 scale = V16::set1(1.f / std::sqrt(hsum(squares) / float(p.cols) + p.eps));
  T* out = static_cast<T*>(p.out) + row * p.cols;
  for (int64_t i = 0; i < p.cols; i += 16) {
    V16 y = V16::load(x + i) * scale;
    if (p.cast_first) y = round_to<T>(y);
    if (weight) y = y * V16::load(weight + i);
    store_some(y, out + i, p.cols - i);
  }
}

template <class T>
void layer_norm_row(const Norm& p, const float* weight, const float* bias, int64_t row) {
  float* x = scratch<RowScratch>(padded(p.cols));
  load_row<T>(p, row, x);
  V16 sum = V16::zero();
  for (int64_t i = 0; i < p.cols; i += 16) sum = sum + V16::load(x + i);
  const V16 mean = V16::set1(hsum(sum) / float(p.cols));
  V16 squares = V16::zero();
  for (int64_t i = 0; i < p.cols; i += 16) {
    store_some(V16::load(x + i) - mean, x + i, p.cols - i);  // the padding stays zero: it has no deviation
    const V16 d = V16::load(x + i);
    squares = fma(d, d, squares);
  }
  const V16 scale = V16::set1(1.f / std::sqrt(hsum(squares) / float(p.cols) + p.eps));
  T* out = static_cast<T*>(p.out) + row * p.cols;
  for (int64_t i = 0; i < p.cols; i += 16) {
    V16 y = V16::load(x + i) * scale;
    if (weight) y = y * V16::load(weight + i);
    if (bias) y = y + V16::load(bias + i);
    store_some(y, out + i, p.cols - i);
  }
}

}  // namespace

void rms_norm(const Norm& p, int threads) {
  with_element(p.dtype, [&]<class T>(T) {
    const IeeeMode mode;
    float* weight = widen_parameter<WeightScratch>(p, p.weight);
    if (weight && p.weight_offset != 0.f)
      for (int64_t i = 0; i < p.cols; i += 16) {
        const V16 w = V16::set1(p.weight_offset) + V16::load(weight + i);
        (p.cast_first ? round_to<T>(w) : w).store(weight + i);
      }
    parallel_rows(p.rows, p.rows * p.cols, kElementsPerThread, threads,
                  [&](int64_t row) { rms_norm_row<T>(p, weight, row); });
  });
}

void layer_norm(const Norm& p, int threads) {
  with_element(p.dtype, [&]<class T>(T) {
    const float* weight = widen_parameter<WeightScratch>(p, p.weight);
    const float* bias = widen_parameter<BiasScratch>(p, p.bias);
    parallel_rows(p.rows, p.rows * p.cols, kElementsPerThread, threads,
                  [&](int64_t row) { layer_norm_row<T>(p, weight, bias, row); });
  });
}

}  // namespace llm42::rowwise
