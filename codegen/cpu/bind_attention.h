// Tensors in, pointers out: paged and dense attention (kernels/attention.h). Everything that decides where
// memory is read or written is checked here.
#pragma once
#include "bind_linear.h"
#include "kernels/attention.h"

namespace llm42::bind {

inline Tensor with_contiguous_rows(const Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

inline Tensor metadata(const Tensor& t, ScalarType dtype, int64_t dims, const char* op, const char* name) {
  CHECK_VALUE(t.scalar_type() == dtype && t.dim() == dims, op, ": expected ", name, " with ", dims,
              " dimension(s) of dtype ", dtype, ", got ", t.sizes(), " ", t.scalar_type());
  return t.contiguous();
}

inline Tensor attention_sinks(const std::optional<Tensor>& sinks, int64_t heads, const char* op) {
  if (!sinks) return {};
  CHECK_VALUE(sinks->dim() == 1 && sinks->size(0) == heads, op, ": expected sinks [", heads, "], got ", sinks->sizes());
  return sinks->to(kFloat).contiguous();
}

inline void check_paged_shapes(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& k_cache, const Tensor& v_cache) {
  CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && same(v.sizes(), k.sizes()) && k.size(0) == q.size(0) &&
                  k.size(2) == q.size(2) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              op, ": expected q [T, Hq, D], k and v [T, Hkv, D] with Hkv dividing Hq, got ", q.sizes(), ", ", k.sizes(),
              " and ", v.sizes());
  const int64_t dim = q.size(2), heads = k.size(1);
  CHECK_VALUE(dim > 0 && dim % 8 == 0, op, ": head_dim must be a multiple of 8, got ", dim);
  for (const Tensor* t : {&k, &v, &k_cache, &v_cache})
    CHECK_TYPE(t->scalar_type() == q.scalar_type(), op, ": q, k, v and the caches must have one dtype, got ",
                q.scalar_type(), " and ", t->scalar_type());
  CHECK_VALUE(k_cache.dim() == 4 && k_cache.size(1) == heads && k_cache.size(2) == dim && k_cache.is_contiguous(), op,
              ": expected a contiguous k_cache [pages, ", heads, ", ", dim, ", page], got ", k_cache.sizes());
  CHECK_VALUE(v_cache.dim() == 4 && v_cache.size(0) == k_cache.size(0) && v_cache.size(1) == heads &&
                  v_cache.size(2) == k_cache.size(3) && v_cache.size(3) == dim && v_cache.is_contiguous(),
              op, ": expected a contiguous v_cache [", k_cache.size(0), ", ", heads, ", ", k_cache.size(3), ", ", dim,
              "], got ", v_cache.sizes());
  CHECK_VALUE(k_cache.size(3) > 0 && k_cache.size(3) % 16 == 0, op, ": page size must be a multiple of 16, got ",
              k_cache.size(3));
}

// `pages`: of the cache, or -1 where keys stand without pages in `rows_of_keys` rows.
inline void check_paged_metadata(const char* op, const attention::Paged& p, int64_t pages, int64_t rows_of_keys = 0) {
  CHECK_VALUE(p.cu_seqlens_q[0] == 0, op, ": cu_seqlens_q must begin with 0, got ", p.cu_seqlens_q[0]);
  for (int64_t s = 0; s < p.sequences; s++) {
    const int64_t rows = int64_t(p.cu_seqlens_q[s + 1]) - p.cu_seqlens_q[s], keys = p.kv_lens[s];
    CHECK_VALUE(rows >= 0, op, ": cu_seqlens_q must not decrease, but sequence ", s, " has ", rows, " rows");
    if (rows == 0) continue;
    CHECK_VALUE(keys >= rows, op, ": kv_lens[", s, "] = ", keys, " is less than the ", rows, " rows of the sequence");
    if (!p.block_table) {
      CHECK_VALUE(p.first_key[s] >= 0 && p.first_key[s] + keys <= rows_of_keys, op, ": sequence ", s, " has keys ",
                        p.first_key[s], " to ", p.first_key[s] + keys, ", but there are ", rows_of_keys);
      continue;
    }
    CHECK_VALUE(keys <= p.table_width * p.page, op, ": kv_lens[", s, "] = ", keys, " is more than ", p.table_width,
                " pages of ", p.page, " hold");
    const int32_t* table = p.block_table + s * p.table_width;
    for (int64_t i = 0; i * p.page < keys; i++)
      CHECK_VALUE(table[i] >= 0 && table[i] < pages, op, ": block_table[", s, ", ", i, "] = ", table[i],
                  " is no page of a cache of ", pages);
  }
  CHECK_VALUE(p.cu_seqlens_q[p.sequences] <= p.tokens, op, ": cu_seqlens_q ends at ", p.cu_seqlens_q[p.sequences],
              " but there are ", p.tokens, " rows");
  for (int64_t t = 0; p.slot_mapping && t < p.tokens; t++)
    CHECK_VALUE(p.slot_mapping[t] >= -1 && p.slot_mapping[t] < pages * p.page, op, ": slot_mapping[", t, "] = ",
                p.slot_mapping[t], " is neither -1 nor a slot of a cache of ", pages, " pages of ", p.page);
}

// The schedule of a step, by the thread that makes its calls: so many threads begin with decodes.
inline thread_local int64_t decode_workers = 0;

// Of several threads, one at least begins with prefills.
inline attention::Schedule attention_schedule() {
  const int threads = num_threads();
  return {threads, int(std::min<int64_t>(decode_workers, std::max(1, threads - 1)))};
}

// What the packed calls share. The tensors own what `call` points to.
struct PackedCall {
  const char* op;
  Tensor q, cu_seqlens_q, kv_lens, sinks, out;
  attention::Paged call{};

  PackedCall(const char* op_, const Tensor& q_, const Tensor& cu_seqlens_q_, const Tensor& kv_lens_,
             double scale, int64_t window, double softcap, const std::optional<Tensor>& sinks_)
      : op(op_), q(with_contiguous_rows(q_)), cu_seqlens_q(metadata(cu_seqlens_q_, kInt, 1, op_, "cu_seqlens_q")),
        kv_lens(metadata(kv_lens_, kInt, 1, op_, "kv_lens")), sinks(attention_sinks(sinks_, q_.size(1), op_)),
        out(empty(q_.sizes(), q_.scalar_type())) {
    CHECK_VALUE(window >= 0, op, ": window must not be negative, got ", window);
    CHECK_VALUE(softcap >= 0, op, ": softcap must not be negative, got ", softcap);
    call.dtype = dtype_of(q, op);
    call.q = q.const_data_ptr(), call.q_token = q.stride(0), call.q_head = q.stride(1);
    call.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
    call.kv_lens = kv_lens.const_data_ptr<int32_t>();
    call.sinks = sinks.defined() ? sinks.const_data_ptr<float>() : nullptr;
    call.out = out.mutable_data_ptr();
    call.tokens = q.size(0), call.sequences = kv_lens.size(0);
    call.q_heads = q.size(1), call.head_dim = q.size(2);
    call.scale = float(scale), call.softcap = float(softcap), call.window = window;
  }
};

// Metadata is always checked: that costs nothing next to the call.
inline Tensor paged_attention(const Tensor& q, const Tensor& k_, const Tensor& v_,
                                  const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots_,
                                  const Tensor& cu_seqlens_q, const Tensor& kv_lens,
                                  const Tensor& block_table_, double scale, int64_t window, double softcap,
                                  const std::optional<Tensor>& sinks) {
  const char* op = "paged_attention";
  check_paged_shapes(op, q, k_, v_, k_cache, v_cache);
  const Tensor slots = metadata(slots_, kLong, 1, op, "slot_mapping");
  const Tensor block_table = metadata(block_table_, kInt, 2, op, "block_table");
  PackedCall packed(op, q, cu_seqlens_q, kv_lens, scale, window, softcap, sinks);
  attention::Paged& p = packed.call;
  CHECK_VALUE(slots.size(0) == q.size(0), op, ": expected slot_mapping [", q.size(0), "], got ", slots.sizes());
  CHECK_VALUE(cu_seqlens_q.size(0) == p.sequences + 1 && block_table.size(0) == p.sequences, op,
              ": expected cu_seqlens_q [S + 1], kv_lens [S], block_table [S, P], got ", cu_seqlens_q.sizes(), ", ",
              kv_lens.sizes(), ", ", block_table.sizes());
  const Tensor k = with_contiguous_rows(k_), v = with_contiguous_rows(v_);
  p.k = k.const_data_ptr(), p.k_token = k.stride(0), p.k_head = k.stride(1);
  p.v = v.const_data_ptr(), p.v_token = v.stride(0), p.v_head = v.stride(1);
  p.k_cache = k_cache.mutable_data_ptr(), p.v_cache = v_cache.mutable_data_ptr();
  p.slot_mapping = slots.const_data_ptr<int64_t>();
  p.block_table = block_table.const_data_ptr<int32_t>();
  p.table_width = block_table.size(1), p.page = k_cache.size(3), p.kv_heads = k.size(1);
  check_paged_metadata(op, p, k_cache.size(0));
  attention::paged(p, attention_schedule());
  return packed.out;
}

inline void check_varlen_shapes(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                bool paged) {
  const int64_t dims = paged ? 4 : 3;
  CHECK_VALUE(q.dim() == 3 && k.dim() == dims && same(v.sizes(), k.sizes()) && k.size(-1) == q.size(2) &&
                        k.size(-2) > 0 && q.size(1) % k.size(-2) == 0,
                    op, ": expected q [T, Hq, D], k and v ", paged ? "[pages, page, Hkv, D]" : "[Tk, Hkv, D]",
                    " with Hkv dividing Hq, got ", q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  CHECK_VALUE(q.size(2) > 0 && q.size(2) % 8 == 0, op, ": head_dim must be a multiple of 8, got ", q.size(2));
  CHECK_VALUE(!paged || (k.size(1) > 0 && k.size(1) % 16 == 0), op,
                    ": page size must be a multiple of 16, got ", k.size(1));
  for (const Tensor* t : {&k, &v})
    CHECK_TYPE(t->scalar_type() == q.scalar_type(), op, ": q, k and v must have one dtype, got ",
                     q.scalar_type(), " and ", t->scalar_type());
}

inline Tensor varlen_attention(const Tensor& q, const Tensor& k_, const Tensor& v_,
                                   const Tensor& cu_seqlens_q, const Tensor& kv_lens,
                                   const std::optional<Tensor>& cu_seqlens_k_,
                                   const std::optional<Tensor>& block_table_, double scale, int64_t window,
                                   double softcap, const std::optional<Tensor>& sinks) {
  const char* op = "varlen_attention";
  const bool paged = block_table_.has_value();
  CHECK_VALUE(paged != cu_seqlens_k_.has_value(), op, ": expected either cu_seqlens_k or block_table");
  check_varlen_shapes(op, q, k_, v_, paged);
  const Tensor k = with_contiguous_rows(k_), v = with_contiguous_rows(v_);
  PackedCall packed(op, q, cu_seqlens_q, kv_lens, scale, window, softcap, sinks);
  attention::Paged& p = packed.call;
  const Tensor table =
      paged ? metadata(*block_table_, kInt, 2, op, "block_table") : metadata(*cu_seqlens_k_, kInt, 1, op, "cu_seqlens_k");
  CHECK_VALUE(cu_seqlens_q.size(0) == p.sequences + 1 && table.size(0) == p.sequences + !paged, op,
                    ": expected cu_seqlens_q [S + 1], kv_lens [S], cu_seqlens_k [S + 1] or block_table [S, P], got ",
                    cu_seqlens_q.sizes(), ", ", kv_lens.sizes(), " and ", table.sizes());
  p.by_token = true;
  p.k_cache = const_cast<void*>(k.const_data_ptr()), p.v_cache = const_cast<void*>(v.const_data_ptr());  // only read
  p.key_page = k.stride(0), p.key_token = k.stride(-3), p.key_head = k.stride(-2);
  p.value_page = v.stride(0), p.value_token = v.stride(-3), p.value_head = v.stride(-2);
  p.kv_heads = k.size(-2), p.page = paged ? k.size(1) : 0, p.table_width = paged ? table.size(1) : 0;
  (paged ? p.block_table : p.first_key) = table.const_data_ptr<int32_t>();
  check_paged_metadata(op, p, paged ? k.size(0) : -1, paged ? 0 : k.size(0));
  attention::paged(p, attention_schedule());
  return packed.out;
}

inline void check_dense_shapes(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && same(v.sizes(), k.sizes()) && k.size(0) == q.size(0) &&
                        k.size(3) == q.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    op, ": expected q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] with Hkv dividing Hq, got ", q.sizes(),
                    ", ", k.sizes(), " and ", v.sizes());
  CHECK_VALUE(q.size(3) > 0 && q.size(3) % 8 == 0, op, ": head_dim must be a multiple of 8, got ", q.size(3));
  for (const Tensor* t : {&k, &v})
    CHECK_TYPE(t->scalar_type() == q.scalar_type(), op, ": q, k and v must have one dtype, got ",
                     q.scalar_type(), " and ", t->scalar_type());
}

// [B, Hq, Sq, Sk] of bool or float32, with stride 0 where it is broadcast.
inline Tensor dense_mask(const char* op, const std::optional<Tensor>& mask, IntArrayRef sizes) {
  if (!mask) return {};
  CHECK_TYPE(mask->scalar_type() == kBool || mask->is_floating_point(), op,
                   ": expected a mask of bool or float, got ", mask->scalar_type());
  const int64_t dims = mask->dim();
  bool fits = dims <= 4;
  for (int64_t i = 1; fits && i <= dims; i++)
    fits = mask->size(-i) == 1 || mask->size(-i) == sizes[sizes.size() - size_t(i)];
  CHECK_VALUE(fits, op, ": a mask of ", mask->sizes(), " does not broadcast to ", sizes);
  const Tensor supported = mask->scalar_type() == kBool ? *mask : mask->to(kFloat);
  return supported.expand(sizes);
}

// One call on dense tensors, which own what `call` points to.
struct DenseTensors {
  Tensor q, k, v, mask, out;
  attention::Dense call{};

  DenseTensors(const char* op, const Tensor& q_, const Tensor& k_, const Tensor& v_,
               const std::optional<Tensor>& mask_, double scale, bool causal, int64_t window, double softcap) {
    check_dense_shapes(op, q_, k_, v_);
    CHECK_VALUE(window >= 0, op, ": window must not be negative, got ", window);
    CHECK_VALUE(softcap >= 0, op, ": softcap must not be negative, got ", softcap);
    q = with_contiguous_rows(q_), k = with_contiguous_rows(k_), v = with_contiguous_rows(v_);
    const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2), kv_len = k.size(2), dim = q.size(3);
    mask = dense_mask(op, mask_, {batch, heads, q_len, kv_len});
    out = empty({batch, q_len, heads, dim}, q.scalar_type()).transpose(1, 2);
    attention::Dense& p = call;
    p.dtype = dtype_of(q, op);
    p.q = q.const_data_ptr(), p.q_batch = q.stride(0), p.q_head = q.stride(1), p.q_token = q.stride(2);
    p.k = k.const_data_ptr(), p.k_batch = k.stride(0), p.k_head = k.stride(1), p.k_token = k.stride(2);
    p.v = v.const_data_ptr(), p.v_batch = v.stride(0), p.v_head = v.stride(1), p.v_token = v.stride(2);
    if (mask.defined()) {
      if (mask.scalar_type() == kBool)
        p.mask = mask.const_data_ptr<bool>();
      else
        p.bias = mask.const_data_ptr<float>();
      p.mask_batch = mask.stride(0), p.mask_head = mask.stride(1), p.mask_token = mask.stride(2);
      p.mask_key = mask.stride(3);
    }
    p.out = out.mutable_data_ptr(), p.out_batch = out.stride(0), p.out_head = out.stride(1);
    p.out_token = out.stride(2);
    p.batch = batch, p.q_heads = heads, p.kv_heads = k.size(1), p.q_len = q_len, p.kv_len = kv_len, p.head_dim = dim;
    p.scale = float(scale), p.softcap = float(softcap), p.window = window, p.causal = causal;
  }
};

inline Tensor dense_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const std::optional<Tensor>& mask, double scale, bool causal, int64_t window,
                                  double softcap) {
  const DenseTensors tensors("dense_attention", q, k, v, mask, scale, causal, window, softcap);
  attention::dense(tensors.call, {num_threads()});
  return tensors.out;
}

inline void register_attention(Library& m) {
  m.impl("dense_attention", TORCH_BOX(&dense_attention));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
}

}  // namespace llm42::bind
