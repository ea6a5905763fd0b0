// The one translation unit that sees torch: turns tensors into pointers and sizes, and registers the
// CPU implementations of the llm42 operators. Each part's wrappers stand in their own header.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
