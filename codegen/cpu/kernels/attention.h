// Attention over paged and over dense keys and values.
//
// Order of reduction for one query row and head, whatever shares the call: the keys are taken in splits
// of kSplit absolute positions. In a split, each score is one chain fma over the head dimension,
// ascending; the maximum is exact; the exponentials of key j are summed in lane j % 16, ascending, then
// in the tree of hsum(); each output element is one chain fma over the visible keys, ascending. Splits
// are folded from the left. Hidden keys take no part in any of it.
#pragma once
#include "element.h"

namespace llm42::attention {

struct Paged {
  Dtype dtype;
  const void *q, *k, *v;  // [T, Hq, D], [T, Hkv, D] twice; D contiguous
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides in elements
  void* k_cache;  // [pages, Hkv, D, page]
  void* v_cache;  // [pages, Hkv, page, D]
  const int64_t* slot_mapping;  // [T]
  const int32_t* cu_seqlens_q;  // [S + 1]
  const int32_t* kv_lens;       // [S]
  const int32_t* block_table;   // [S, table_width]
  const float* sinks;           // [Hq] or null
  void* out;                    // [T, Hq, D] contiguous
  int64_t tokens, sequences, table_width, page, q_heads, kv_heads, head_dim;
  float scale, softcap;
  int64_t window;  // 0: unlimited
};

void paged(const Paged& p, int threads);

struct Dense {
  Dtype dtype;
  const void *q, *k, *v;  // [B, Hq, Sq, D], [B, Hkv, Sk, D] twice; D contiguous
  int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;
  const bool* mask;   // [B, Hq, Sq, Sk] with the strides below (0 where broadcast), or null
  const float* bias;  // added to the scores, same shape and strides; at most one of the two
  int64_t mask_batch, mask_head, mask_token, mask_key;
  void* out;  // [B, Hq, Sq, D]
  int64_t out_batch, out_head, out_token;
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
  float scale, softcap;
  int64_t window;
  bool causal;
};

void dense(const Dense& p, int threads);

}  // namespace llm42::attention
