// The one translation unit that sees torch: turns tensors into pointers and sizes, and registers the
// CPU implementations of the llm42 operators. Each part's wrappers stand in their own header.

#include "bind_attention.h"
#include "bind_grouped.h"
#include "bind_linear.h"
#include "bind_quant.h"
#include "bind_rowwise.h"
#include "bind_sample.h"

STABLE_TORCH_LIBRARY_IMPL(llm42, CPU, m) {
  llm42::bind::register_attention(m);
  llm42::bind::register_grouped(m);
  llm42::bind::register_linear(m);
  llm42::bind::register_quant(m);
  llm42::bind::register_rowwise(m);
  llm42::bind::register_sample(m);
}

// Of this thread, from here on. Returns how many there were.
extern "C" __attribute__((visibility("default"))) int64_t llm42_decode_workers(int64_t workers) {
  return std::exchange(llm42::bind::decode_workers, workers);
}
