// Attention over paged and over dense keys and values.
//
// Order of reduction for one query row and head, whatever shares the call: the keys are taken in splits
// of kSplit absolute positions. In a split, each score is one chain fma over the head dimension,
// ascending (of bf16, with zeros for denormals); the maximum is exact; the exponentials of key j are summed in lane j % 16, ascending, then
// in the tree of hsum(); each output element is one chain fma over the visible keys, ascending. Splits
// are folded from the left. Hidden keys take no part in any of it.
#pragma once
#include "element.h"

namespace llm42::attention {

// Who runs what; nothing of it shows in the bits. `decode_workers` threads begin with decodes while the
// others begin with prefills, and each goes on with the other kind when its own is done; with 0, every
// thread takes what is longest.
struct Schedule {
  int threads;
  int decode_workers = 0;
};

// Keys and values stand in pages of `page` tokens: keys transposed, or (`by_token`) both token by token, and
// then also without pages, the keys of sequence s from row first_key[s] on.
struct Paged {
  Dtype dtype;
  const void *q, *k, *v;  // [T, Hq, D], [T, Hkv, D] twice; D contiguous
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides in elements
  void* k_cache;  // [pages, Hkv, D, page], or by token [pages, page, Hkv, D] or [Tk, Hkv, D]
  void* v_cache;  // [pages, Hkv, page, D], or as the keys
  bool by_token;
  int64_t key_page, key_token, key_head, value_page, value_token, value_head;  // strides of both, by token
  const int64_t* slot_mapping;  // [T], or null: nothing is written
  const int32_t* cu_seqlens_q;  // [S + 1]
  const int32_t* kv_lens;       // [S]
  const int32_t* block_table;   // [S, table_width], or null
  const int32_t* first_key;     // [S], in place of block_table
  const float* sinks;           // [Hq] or null
  void* out;                    // [T, Hq, D] contiguous
  int64_t tokens, sequences, table_width, page, q_heads, kv_heads, head_dim;
  float scale, softcap;
  int64_t window;  // 0: unlimited
};

void paged(const Paged& p, const Schedule& how);

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

void dense(const Dense& p, const Schedule& how);

}  // namespace llm42::attention
