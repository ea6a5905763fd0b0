"""Writes of keys and values into the paged caches."""

import triton
import triton.language as tl

KV_HEADS = tl.constexpr(8)
HEAD_DIM = tl.constexpr(128)
DIM = tl.constexpr(128)  # the power of two from HEAD_DIM
PAGE = tl.constexpr(16)


@triton.jit(do_not_specialize=["slot_mapping_ptr"])
def kv_write(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_mapping_ptr,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h,
):  # fmt: skip
    """Program (token, KV head). k_cache: [pages, Hkv, D, page], v_cache: [pages, Hkv, page, D]."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot >= 0:
        at_page = (slot // PAGE * KV_HEADS + kv_head) * (HEAD_DIM * PAGE)
        offset = slot % PAGE
        dim = tl.arange(0, DIM)
        held = dim < HEAD_DIM
        k = tl.load(k_ptr + token * k_stride_t + kv_head * k_stride_h + dim, mask=held)
        v = tl.load(v_ptr + token * v_stride_t + kv_head * v_stride_h + dim, mask=held)
        tl.store(k_cache_ptr + at_page + dim * PAGE + offset, k, mask=held)
        tl.store(v_cache_ptr + at_page + offset * HEAD_DIM + dim, v, mask=held)
