// Threads, their floating-point mode and their memory. OpenMP here is the runtime torch has loaded, so
// torch's pool is used.
#pragma once
#include <omp.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace llm42 {

// While it lives, the calling thread rounds to nearest, and keeps subnormal numbers or (`Flush`) takes and gives
// zero for them. A program may have set something else (torch.set_flush_denormal, a library linked with
// -ffast-math), and for some of the threads only: the bits of a row would then depend on who computes it.
template <bool Flush>
class FloatMode {
 public:
  FloatMode() : before_(read()) {
    if (before_ != wanted()) write(wanted());
  }
  ~FloatMode() {
    if (before_ != wanted()) write(before_);
  }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#if defined(__SSE__)
  using Word = unsigned;
  static constexpr Word kFlush = 0x8000 | 0x0040, kRounding = 0x6000;  // flush to zero, denormals are zero
  static Word read() { return _mm_getcsr(); }
  static void write(Word word) {
    asm volatile("" ::: "memory");
    _mm_setcsr(word);
    asm volatile("" ::: "memory");
  }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kFlush = 0x1000000 | 0x80000, kRounding = 0xc00000;  // FZ, FZ16; RMode
  static Word read() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void write(Word word) { asm volatile("msr fpcr, %0" ::"r"(word) : "memory"); }
#else
  using Word = unsigned;
  static constexpr Word kFlush = 0, kRounding = 0;
  static Word read() { return 0; }
  static void write(Word) {}
#endif
  Word wanted() const { return (before_ & ~(kFlush | kRounding)) | (Flush ? kFlush : 0); }
  const Word before_;
};
using IeeeMode = FloatMode<false>;
using FlushMode = FloatMode<true>;

// f(thread, team) on `threads` threads; on the caller alone, without a parallel region, for one.
template <class F>
inline void parallel(int threads, F f) {
  if (threads <= 1) {
    const IeeeMode mode;
    return f(0, 1);
  }
#pragma omp parallel num_threads(threads)
  {
    const IeeeMode mode;
    f(omp_get_thread_num(), omp_get_num_threads());
  }
}

// f(row) for all rows, in contiguous shares; `work` is what decides how many threads are woken.
template <class F>
inline void parallel_rows(int64_t rows, int64_t work, int64_t work_per_thread, int threads, F f) {
  const int64_t useful = std::clamp<int64_t>(work / work_per_thread, 1, threads);
  parallel(int(std::min<int64_t>(useful, rows)), [&](int thread, int team) {
    for (int64_t i = rows * thread / team; i < rows * (thread + 1) / team; i++) f(i);
  });
}

// Memory of the calling thread for one use (Tag), grown when needed and kept between calls.
template <class Tag>
inline float* scratch(int64_t count) {
  thread_local std::unique_ptr<float[]> data;
  thread_local int64_t size = 0;
  if (size < count) {
    data.reset(new float[size_t(count)]);
    size = count;
  }
  return data.get();
}

}  // namespace llm42
