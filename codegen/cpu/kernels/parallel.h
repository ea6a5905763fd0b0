// Threads and their memory. OpenMP here is the runtime torch has loaded, so torch's pool is used.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace llm42 {

// f(thread, team) on `threads` threads; on the caller alone, without a parallel region, for one.
template <class F>
inline void parallel(int threads, F f) {
  if (threads <= 1) return f(0, 1);
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
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
