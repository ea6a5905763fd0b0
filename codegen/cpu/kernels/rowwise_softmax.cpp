// Sums, softmax and log-softmax of rows.
#include "parallel.h"
#include "rowwise.h"

namespace llm42::rowwise {

namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

struct RowScratch;

template <class T>
V16 row_max(const T* x, int64_t cols) {
  V16 top = V16::set1(-INFINITY);
  for (int64_t i = 0; i < cols; i += 16) top = max(top, load_some(x + i, cols - i, -INFINITY));
  return V16::set1(hmax(top));
}

// exp(x - m) -> e, padded with zeros; returns the sum.
template <class T>
float row_exp(const T* x, int64_t cols, V16 m, float* e) {
  V16 sum = V16::zero();
  for (int64_t i = 0; i < cols; i += 16) {
    store_some(exp_nonpositive(load_some(x + i, cols - i) - m), e + i, cols - i);
    sum = sum + load_some(e + i, cols - i);
  }
  return hsum(sum);
}

template <class T>
void softmax_row(const T* x, int64_t cols, T* out, bool as_log) {
  float* e = scratch<RowScratch>(cols);
  const V16 m = row_max(x, cols);
  const float total = row_exp(x, cols, m, e);
  const V16 shift = V16::set1(log(total)), divisor = V16::set1(total);
  for (int64_t i = 0; i < cols; i += 16) {
    const int64_t n = cols - i;
    store_some(as_log ? (load_some(x + i, n) - m) - shift : load_some(e + i, n) / divisor, out + i, n);
  }
}

}  // namespace

void row_sum(Dtype dtype, Rows x, int64_t rows, int64_t cols, void* out, int threads) {
  with_element(dtype, [&]<class T>(T) {
    parallel_rows(rows, rows * cols, kElementsPerThread, threads, [&](int64_t row) {
      const T* p = static_cast<const T*>(x.data) + row * x.stride;
      V16 sum = V16::zero();
      for (int64_t i = 0; i < cols; i += 16) sum = sum + load_some(p + i, cols - i);
      static_cast<T*>(out)[row] = from_float<T>(hsum(sum));
    });
  });
}

void row_softmax(Dtype dtype, Rows x, int64_t rows, int64_t cols, void* out, bool log, int threads) {
  with_element(dtype, [&]<class T>(T) {
    parallel_rows(rows, rows * cols, kElementsPerThread / 4, threads, [&](int64_t row) {
      softmax_row(static_cast<const T*>(x.data) + row * x.stride, cols, static_cast<T*>(out) + row * cols, log);
    });
  });
}

}  // namespace llm42::rowwise
