// Tensors in, pointers out: sampling and log-probabilities (kernels/sample.h).
#pragma once
#include <cmath>
#include <tuple>

#include "bind_linear.h"
#include "kernels/sample.h"

namespace llm42::bind {

// [R, V] with contiguous rows; `keep` owns a copy if one is needed.
struct LogitsView {
  at::Tensor keep;
  sampling::Logits logits;

  LogitsView(const at::Tensor& x, const char* op) {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) > 0, op, ": expected logits [R, V] with V > 0, got ", x.sizes());
    const at::Tensor supported = x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x;
    logits.dtype = dtype_of(supported, op);
    keep = supported.size(1) == 1 || supported.stride(1) == 1 ? supported : supported.contiguous();
    logits.data = keep.const_data_ptr();
    logits.stride = keep.stride(0), logits.rows = keep.size(0), logits.vocab = keep.size(1);
  }

  at::Tensor output(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::empty(sizes, keep.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous));
  }
};

inline at::Tensor per_row(const at::Tensor& t, at::ScalarType dtype, int64_t rows, const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == rows, "sample: expected ", name, " [", rows,
              "] of dtype ", dtype, ", got ", t.sizes(), " ", t.scalar_type());
  return t.contiguous();
}

inline void check_sampling_parameters(const sampling::Sample& p) {
  for (int64_t r = 0; r < p.logits.rows; r++) {
    TORCH_CHECK_VALUE(p.temperature[r] >= 0.f && std::isfinite(p.temperature[r]), "sample: temperature[", r, "] = ",
                p.temperature[r], " is not a finite number >= 0");
    TORCH_CHECK_VALUE(p.top_k[r] >= 0, "sample: top_k[", r, "] = ", p.top_k[r], " is negative (0 switches it off)");
    TORCH_CHECK_VALUE(p.top_p[r] >= 0.f && p.top_p[r] <= 1.f, "sample: top_p[", r, "] = ", p.top_p[r], " is not in [0, 1]");
    TORCH_CHECK_VALUE(p.min_p[r] >= 0.f && p.min_p[r] <= 1.f, "sample: min_p[", r, "] = ", p.min_p[r], " is not in [0, 1]");
  }
}

inline std::tuple<at::Tensor, at::Tensor> sample(const at::Tensor& logits, const at::Tensor& temperature_,
                                                 const at::Tensor& top_k_, const at::Tensor& top_p_,
                                                 const at::Tensor& min_p_, const at::Tensor& seed_,
                                                 const at::Tensor& position_) {
  const LogitsView x(logits, "sample");
  const int64_t rows = x.logits.rows;
  const at::Tensor temperature = per_row(temperature_, at::kFloat, rows, "temperature");
  const at::Tensor top_k = per_row(top_k_, at::kInt, rows, "top_k");
  const at::Tensor top_p = per_row(top_p_, at::kFloat, rows, "top_p");
  const at::Tensor min_p = per_row(min_p_, at::kFloat, rows, "min_p");
  const at::Tensor seed = per_row(seed_, at::kLong, rows, "seed");
  const at::Tensor position = per_row(position_, at::kLong, rows, "position");
  const at::Tensor token = x.output({rows}, at::kLong), logprob = x.output({rows}, at::kFloat);
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
  sampling::sample(p, at::get_num_threads());
  return {token, logprob};
}

inline at::Tensor token_logprobs(const at::Tensor& logits, const at::Tensor& tokens_) {
  const LogitsView x(logits, "token_logprobs");
  const int64_t rows = x.logits.rows, vocab = x.logits.vocab;
  TORCH_CHECK_VALUE(tokens_.scalar_type() == at::kLong && (tokens_.dim() == 1 || tokens_.dim() == 2) &&
                  tokens_.size(0) == rows,
              "token_logprobs: expected tokens [", rows, "] or [", rows, ", K] of dtype int64, got ", tokens_.sizes(),
              " ", tokens_.scalar_type());
  const at::Tensor tokens = tokens_.contiguous();
  const int64_t* ids = tokens.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens.numel(); i++)
    TORCH_CHECK_VALUE(ids[i] >= 0 && ids[i] < vocab, "token_logprobs: token ", ids[i], " is not in a vocabulary of ", vocab);
  const at::Tensor out = x.output(tokens.sizes(), at::kFloat);
  sampling::token_logprobs(x.logits, ids, rows ? tokens.numel() / rows : 0, out.mutable_data_ptr<float>(),
                           at::get_num_threads());
  return out;
}

inline std::tuple<at::Tensor, at::Tensor> top_logprobs(const at::Tensor& logits, int64_t k) {
  const LogitsView x(logits, "top_logprobs");
  TORCH_CHECK_VALUE(k >= 1 && k <= x.logits.vocab, "top_logprobs: k = ", k, " is not in [1, ", x.logits.vocab, "]");
  const at::Tensor values = x.output({x.logits.rows, k}, at::kFloat), indices = x.output({x.logits.rows, k}, at::kLong);
  sampling::top_logprobs(x.logits, k, values.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(),
                         at::get_num_threads());
  return {values, indices};
}

inline at::Tensor apply_token_mask(const at::Tensor& logits, const at::Tensor& mask_) {
  TORCH_CHECK_TYPE(logits.scalar_type() != at::kDouble, "apply_token_mask: logits of float64 are not supported");
  const LogitsView x(logits, "apply_token_mask");
  TORCH_CHECK_TYPE(mask_.scalar_type() == at::kInt, "apply_token_mask: expected mask of dtype int32, got ",
                   mask_.scalar_type());
  TORCH_CHECK_VALUE(mask_.dim() == 2 && mask_.size(0) == x.logits.rows && mask_.size(1) == (x.logits.vocab + 31) / 32,
                    "apply_token_mask: expected mask [", x.logits.rows, ", ", (x.logits.vocab + 31) / 32, "], got ",
                    mask_.sizes());
  const at::Tensor mask = mask_.contiguous(), out = x.output(logits.sizes(), logits.scalar_type());
  sampling::apply_token_mask(x.logits, mask.const_data_ptr<int32_t>(), out.mutable_data_ptr(), at::get_num_threads());
  return out;
}

inline void register_sample(torch::Library& m) {
  m.impl("sample", &sample);
  m.impl("token_logprobs", &token_logprobs);
  m.impl("top_logprobs", &top_logprobs);
  m.impl("apply_token_mask", &apply_token_mask);
}

}  // namespace llm42::bind
