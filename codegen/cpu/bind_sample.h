// Tensors in, pointers out: sampling and log-probabilities (kernels/sample.h).
#pragma once
#include <cmath>
#include <tuple>

#include "bind_linear.h"
#include "kernels/sample.h"

namespace llm42::bind {

// [R, V] with contiguous rows; `keep` owns a copy if one is needed.
struct LogitsView {
  Tensor keep;
  sampling::Logits logits;

  LogitsView(const Tensor& x, const char* op) {
    CHECK_VALUE(x.dim() == 2 && x.size(1) > 0, op, ": expected logits [R, V] with V > 0, got ", x.sizes());
    const Tensor supported = x.scalar_type() == kDouble ? x.to(kFloat) : x;
    logits.dtype = dtype_of(supported, op);
    keep = supported.size(1) == 1 || supported.stride(1) == 1 ? supported : supported.contiguous();
    logits.data = keep.const_data_ptr();
    logits.stride = keep.stride(0), logits.rows = keep.size(0), logits.vocab = keep.size(1);
  }

};

inline Tensor per_row(const Tensor& t, ScalarType dtype, int64_t rows, const char* name) {
  CHECK_VALUE(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == rows, "sample: expected ", name, " [", rows,
              "] of dtype ", dtype, ", got ", t.sizes(), " ", t.scalar_type());
  return t.contiguous();
}

inline void check_sampling_parameters(const sampling::Sample& p) {
  for (int64_t r = 0; r < p.logits.rows; r++) {
    CHECK_VALUE(p.temperature[r] >= 0.f && std::isfinite(p.temperature[r]), "sample: temperature[", r, "] = ",
                p.temperature[r], " is not a finite number >= 0");
    CHECK_VALUE(p.top_k[r] >= 0, "sample: top_k[", r, "] = ", p.top_k[r], " is negative (0 switches it off)");
    CHECK_VALUE(p.top_p[r] >= 0.f && p.top_p[r] <= 1.f, "sample: top_p[", r, "] = ", p.top_p[r], " is not in [0, 1]");
    CHECK_VALUE(p.min_p[r] >= 0.f && p.min_p[r] <= 1.f, "sample: min_p[", r, "] = ", p.min_p[r], " is not in [0, 1]");
  }
}

inline std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature_,
                                                 const Tensor& top_k_, const Tensor& top_p_,
                                                 const Tensor& min_p_, const Tensor& seed_,
                                                 const Tensor& position_) {
  const LogitsView x(logits, "sample");
  const int64_t rows = x.logits.rows;
  const Tensor temperature = per_row(temperature_, kFloat, rows, "temperature");
  const Tensor top_k = per_row(top_k_, kInt, rows, "top_k");
  const Tensor top_p = per_row(top_p_, kFloat, rows, "top_p");
  const Tensor min_p = per_row(min_p_, kFloat, rows, "min_p");
  const Tensor seed = per_row(seed_, kLong, rows, "seed");
  const Tensor position = per_row(position_, kLong, rows, "position");
  const Tensor token = empty({rows}, kLong), logprob = empty({rows}, kFloat);
  const sampling::Sample p{x.logits,
                           temperature.const_data_ptr<float>(),
                           top_p.const_data_ptr<float>(),
                           min_p.const_data_ptr<float>(),
                           top_k.const_data_ptr<int32_t>(),
                           seed.const_data_ptr<int64_t>(),
                           position.const_data_ptr<int64_t>(),
                           token.mutable_data_ptr<int64_t>(),
                           logprob.mutable_data_ptr<float>()};
  check_sampling_parameters(p);
  sampling::sample(p, num_threads());
  return {token, logprob};
}

inline Tensor token_logprobs(const Tensor& logits, const Tensor& tokens_) {
  const LogitsView x(logits, "token_logprobs");
  const int64_t rows = x.logits.rows, vocab = x.logits.vocab;
  CHECK_VALUE(tokens_.scalar_type() == kLong && (tokens_.dim() == 1 || tokens_.dim() == 2) &&
                  tokens_.size(0) == rows,
              "token_logprobs: expected tokens [", rows, "] or [", rows, ", K] of dtype int64, got ", tokens_.sizes(),
              " ", tokens_.scalar_type());
  const Tensor tokens = tokens_.contiguous();
  const int64_t* ids = tokens.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens.numel(); i++)
    CHECK_VALUE(ids[i] >= 0 && ids[i] < vocab, "token_logprobs: token ", ids[i], " is not in a vocabulary of ", vocab);
  const Tensor out = empty(tokens.sizes(), kFloat);
  sampling::token_logprobs(x.logits, ids, rows ? tokens.numel() / rows : 0, out.mutable_data_ptr<float>(),
                           num_threads());
  return out;
}

inline std::tuple<Tensor, Tensor> top_logprobs(const Tensor& logits, int64_t k) {
  const LogitsView x(logits, "top_logprobs");
  CHECK_VALUE(k >= 1 && k <= x.logits.vocab, "top_logprobs: k = ", k, " is not in [1, ", x.logits.vocab, "]");
  const Tensor values = empty({x.logits.rows, k}, kFloat), indices = empty({x.logits.rows, k}, kLong);
  sampling::top_logprobs(x.logits, k, values.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(),
                         num_threads());
  return {values, indices};
}

inline Tensor apply_token_mask(const Tensor& logits, const Tensor& mask_) {
  CHECK_TYPE(logits.scalar_type() != kDouble, "apply_token_mask: logits of float64 are not supported");
  const LogitsView x(logits, "apply_token_mask");
  CHECK_TYPE(mask_.scalar_type() == kInt, "apply_token_mask: expected mask of dtype int32, got ",
                   mask_.scalar_type());
  CHECK_VALUE(mask_.dim() == 2 && mask_.size(0) == x.logits.rows && mask_.size(1) == (x.logits.vocab + 31) / 32,
                    "apply_token_mask: expected mask [", x.logits.rows, ", ", (x.logits.vocab + 31) / 32, "], got ",
                    mask_.sizes());
  const Tensor mask = mask_.contiguous(), out = empty(logits.sizes(), logits.scalar_type());
  sampling::apply_token_mask(x.logits, mask.const_data_ptr<int32_t>(), out.mutable_data_ptr(), num_threads());
  return out;
}

inline void register_sample(Library& m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("top_logprobs", TORCH_BOX(&top_logprobs));
  m.impl("apply_token_mask", TORCH_BOX(&apply_token_mask));
}

}  // namespace llm42::bind
