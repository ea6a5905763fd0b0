// silu(gate) * up, and rotary position embedding (RoFormer, arXiv 2104.09864) in the half-split form.
#include "parallel.h"
#include "rowwise.h"

namespace llm42::rowwise {

namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

// out = round(round(x * cos) + round(rotate_half(x) * sin)): the roundings of the three eager operations.
template <class T>
void rotary_head(const T* x, const T* cos, const T* sin, int64_t dim, int64_t rotary_dim, T* out) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i;
    const V16 a = load_some(x + i, n), b = load_some(x + half + i, n);
    const V16 minus_b = b * V16::set1(-1.f);
    const V16 first = round_to<T>(a * load_some(cos + i, n)) + round_to<T>(minus_b * load_some(sin + i, n));
    const V16 second =
        round_to<T>(b * load_some(cos + half + i, n)) + round_to<T>(a * load_some(sin + half + i, n));
    store_some(first, out + i, n);
    store_some(second, out + half + i, n);
  }
  std::copy(x + rotary_dim, x + dim, out + rotary_dim);
}

}  // namespace

void silu_mul(Dtype dtype, Rows x, int64_t rows, int64_t cols, void* out, int threads) {
  with_element(dtype, [&]<class T>(T) {
    parallel_rows(rows, rows * cols, kElementsPerThread / 4, threads, [&](int64_t row) {
      const T* gate = static_cast<const T*>(x.data) + row * x.stride;
      const T* up = gate + cols;
      T* y = static_cast<T*>(out) + row * cols;
      for (int64_t i = 0; i < cols; i += 16)
        store_some(llm42::silu_mul<T>(load_some(gate + i, cols - i), load_some(up + i, cols - i)), y + i, cols - i);
    });
  });
}

void rotary(const Rotary& p, int threads) {
  with_element(p.dtype, [&]<class T>(T) {
    const int64_t rows = p.tokens * p.heads;
    parallel_rows(rows, rows * p.dim, kElementsPerThread, threads, [&](int64_t row) {
      const int64_t t = row / p.heads, h = row % p.heads;
      rotary_head(static_cast<const T*>(p.x) + t * p.token_stride + h * p.head_stride,
                  static_cast<const T*>(p.cos.data) + t * p.cos.stride,
                  static_cast<const T*>(p.sin.data) + t * p.sin.stride, p.dim, p.rotary_dim,
                  static_cast<T*>(p.out) + row * p.dim);
    });
  });
}

}  // namespace llm42::rowwise
