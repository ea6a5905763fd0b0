// Sampling and log-probabilities of rows of logits. Rows never mix: whatever a row gives depends on its
// own logits and parameters.
//
// Order of reduction: the maximum is exact; exp(x - max) of entry i is summed in lane i % 16, ascending,
// then in the tree of hsum().
#pragma once
#include "element.h"

namespace llm42::sampling {

struct Logits {
  Dtype dtype;
  const void* data;  // [rows, vocab], rows `stride` elements apart
  int64_t stride, rows, vocab;
};

struct Sample {
  Logits logits;
  const float *temperature, *top_p, *min_p;  // [rows]
  const int32_t* top_k;
  const int64_t *seed, *position;
  int64_t* token;  // [rows]; -1 where a row holds NaN or has no finite maximum
  float* logprob;  // [rows]
};

void sample(const Sample& p, int threads);

// out[r][n] = log-probability of tokens[r][n]; tokens are in range.
void token_logprobs(const Logits& x, const int64_t* tokens, int64_t count, float* out, int threads);

// The k greatest log-probabilities, descending, equal ones by ascending index.
void top_logprobs(const Logits& x, int64_t k, float* values, int64_t* indices, int threads);

// out[r][v] = the logit if bit v % 32 of mask[r][v / 32] is set, else minus infinity. mask: [rows, ceil(vocab / 32)].
void apply_token_mask(const Logits& x, const int32_t* mask, void* out, int threads);

}  // namespace llm42::sampling
