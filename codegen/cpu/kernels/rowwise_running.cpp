// Running sums and products of rows: one chain a row.
#include "parallel.h"
#include "rowwise.h"

namespace llm42::rowwise {

namespace {

constexpr int64_t kElementsPerThread = 1 << 13;

}  // namespace

void running(Dtype dtype, Rows x, int64_t rows, int64_t cols, void* out, bool product, int threads) {
  with_element(dtype, [&]<class T>(T) {
    parallel_rows(rows, rows * cols, kElementsPerThread, threads, [&](int64_t row) {
      const T* p = static_cast<const T*>(x.data) + row * x.stride;
      T* y = static_cast<T*>(out) + row * cols;
      float total = product ? 1.0f : -0.0f;  // neither changes the first element
      for (int64_t i = 0; i < cols; i++) {
        total = product ? total * to_float(p[i]) : total + to_float(p[i]);
        y[i] = from_float<T>(total);
      }
    });
  });
}

}  // namespace llm42::rowwise
