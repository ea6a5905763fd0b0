"""Folds the partial results of the splits of each decoding sequence, in index order."""

from __future__ import annotations

import functools

from llm42c.codegen.triton import fragments
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import AttentionSpec

_COMBINE = '''
@triton.jit(do_not_specialize=["cu_seqlens_ptr"])
def attention_combine(
    partial_ptr, stats_ptr, sinks_ptr, out_ptr, cu_seqlens_ptr, plan_ptr, out_stride_t,
):
    """Program (sequence, KV head). partial: [slots, Hkv, rows, D], stats: [slots, Hkv, rows, 2]."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    slot = tl.load(plan_ptr + sequence * 2)
    splits = tl.load(plan_ptr + sequence * 2 + 1)
    if splits > 1:
        q_begin = tl.load(cu_seqlens_ptr + sequence)
        q_len = tl.load(cu_seqlens_ptr + sequence + 1) - q_begin
        row = tl.arange(0, DECODE_ROWS)
        token = row // GROUP
        head = kv_head * GROUP + row % GROUP
        live = (row < DECODE_TOKENS * GROUP) & (token < q_len)
        dim = tl.arange(0, DIM)
        held = live[:, None] & (dim < HEAD_DIM)[None, :]
        total_max = tl.full([DECODE_ROWS], float("-inf"), tl.float32)
        total_sum = tl.zeros([DECODE_ROWS], tl.float32)
        total = tl.zeros([DECODE_ROWS, DIM], tl.float32)
        for i in tl.range(0, splits):
            line = ((slot + i).to(tl.int64) * KV_HEADS + kv_head) * DECODE_ROWS + row
            row_max = tl.load(stats_ptr + line * 2, mask=live, other=float("-inf"))
            row_sum = tl.load(stats_ptr + line * 2 + 1, mask=live, other=0.0)
            acc = tl.load(partial_ptr + line[:, None] * HEAD_DIM + dim[None, :], mask=held, other=0.0)
            total_max, total_sum, total = fold(total_max, total_sum, total, row_max, row_sum, acc)
        result = finish(total_max, total_sum, total, sinks_ptr, head)
        at = (q_begin + token).to(tl.int64) * out_stride_t + head * HEAD_DIM
        tl.store(out_ptr + at[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=held)
'''


@functools.cache
def emit(spec: AttentionSpec) -> str:
    """The file of one specialisation; its kernel is ``attention_combine``."""
    return module(
        "Folds splits of decode attention from the left",
        spec.subject(),
        spec.constants(),
        fragments.FOLD,
        fragments.finish(spec.sinks),
        _COMBINE,
    )
