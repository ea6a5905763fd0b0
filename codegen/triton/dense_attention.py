"""Scaled dot-product attention on a GPU, in the order of the paged kernel, with a mask.

Keys in blocks from index 0, an online softmax inside a split, splits folded from the left. One tile for
every number of queries, so a row's bits do not depend on ``B``, ``Sq`` or ``Sk``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm42c.codegen.target import Target
from llm42c.codegen.triton import fragments, kernel
from llm42c.codegen.triton.devices import target_of
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import DTYPES, power_of_two, tiles

_KERNEL = '''
@triton.jit
def dense_attention(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, q_len, kv_len,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    heads, scale, softcap, window,
):
    """q: [B, Hq, Sq, D], k, v: [B, Hkv, Sk, D], out: [B, Sq, Hq, D]. Program (tile of queries, B · Hq)."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < q_len
    position = row if CAUSAL else row + (kv_len - q_len)
    dim = tl.arange(0, DIM)
    inside = live[:, None] & (dim < HEAD_DIM)[None, :]
    q_at = q_ptr + batch * q_stride_b + head * q_stride_h
    q = tl.load(q_at + row[:, None] * q_stride_t + dim[None, :], mask=inside, other=0.0)  # [M, D]
    k_at = k_ptr + batch * k_stride_b + head // GROUP * k_stride_h
    v_at = v_ptr + batch * v_stride_b + head // GROUP * v_stride_h
    end = tl.minimum(kv_len, tl.program_id(0) * ROWS + ROWS) if CAUSAL else kv_len

    total_max = tl.full([ROWS], float("-inf"), tl.float32)
    total_sum = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DIM], tl.float32)
    for split in tl.range(0, (end + SPLIT - 1) // SPLIT, num_stages=1, disable_licm=True):
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        high = tl.minimum(split * SPLIT + SPLIT, end)
        for start in tl.range(split * SPLIT, high, KEYS, num_stages=STAGES, disable_licm=True):
            key = start + tl.arange(0, KEYS)
            held = key < end
            k = tl.load(
                k_at + key[None, :].to(tl.int64) * k_stride_t + dim[:, None],
                mask=held[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
            )  # [D, N]
            score = tl.dot(q, k, input_precision="ieee")
@SCORE@
            seen = held[None, :] & live[:, None]
            if CAUSAL:
                seen = seen & (key[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
@MASK@
            score = tl.where(seen, score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
            weight = tl.exp2(score - base[:, None])
            decay = tl.exp2(row_max - base)
            row_sum = tl.fma(row_sum, decay, tl.sum(weight, 1))
            acc = acc * decay[:, None]
            v = tl.load(
                v_at + key[:, None].to(tl.int64) * v_stride_t + dim[None, :],
                mask=held[:, None] & (dim < HEAD_DIM)[None, :], other=0.0,
            )  # [N, D]
            acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
            row_max = new_max
        total_max, total_sum, total = fold(total_max, total_sum, total, row_max, row_sum, acc)
    result = finish(total_max, total_sum, total, out_ptr, head)
    at_out = ((batch * q_len + row) * heads + head) * HEAD_DIM
    tl.store(out_ptr + at_out[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
'''
_MASK_AT = """
            at = mask_ptr + batch * mask_stride_b + head * mask_stride_h
            at = at + row[:, None].to(tl.int64) * mask_stride_q + key[None, :] * mask_stride_k
"""
_BOOL = """
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
"""
_ADDED = """
            score = score + tl.load(at, mask=seen, other=0.0) * LOG2E
"""
_SCALE = """
            score = score * (scale * LOG2E)
"""
_CAP = """
            capped = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2E * scale / softcap)))  # tanh
            score = capped * (softcap * LOG2E)
"""


@dataclass(frozen=True)
class DenseSpec:
    """One kernel. ``mask``: "", "bool" or "float"."""

    group: int
    head_dim: int
    dtype: str
    causal: bool
    window: bool
    softcap: bool
    mask: str
    rows: int
    keys: int
    warps: int
    stages: int
    split: int = 512


def spec_for(
    target: Target,
    group: int,
    head_dim: int,
    dtype: str,
    causal: bool,
    window: bool,
    softcap: bool,
    mask: str,
) -> DenseSpec:
    """The tile for a target and head."""
    rows, keys, warps, _ = tiles(target, head_dim, dtype)
    rows, keys = min(rows, 32), min(keys, 32)  # the mask's and the keys' addresses need registers too
    return DenseSpec(group, head_dim, dtype, causal, window, softcap, mask, rows, keys, warps, stages=1)


def emit(spec: DenseSpec) -> str:
    """The file of one specialisation; its kernel is ``dense_attention``."""
    mask = {"": "", "bool": _MASK_AT + _BOOL.lstrip("\n"), "float": _MASK_AT + _ADDED.lstrip("\n")}[spec.mask]
    text = _KERNEL.replace("@SCORE@", (_CAP if spec.softcap else _SCALE).strip("\n"))
    text = text.replace("@MASK@\n", mask.lstrip("\n"))
    constants = {
        "GROUP": spec.group,
        "HEAD_DIM": spec.head_dim,
        "DIM": power_of_two(spec.head_dim),
        "ROWS": spec.rows,
        "KEYS": spec.keys,
        "SPLIT": spec.split,
        "STAGES": spec.stages,
        "CAUSAL": spec.causal,
        "HAS_WINDOW": spec.window,
        "LOG2E": 1.4426950408889634,
    }
    subject = f"heads of {spec.head_dim} in groups of {spec.group}, {DTYPES[spec.dtype]}"
    return module(
        "Attention in a fixed order", subject, constants, fragments.FOLD, fragments.finish(False), text
    )


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    """``llm42::dense_attention``. q: [B, Hq, Sq, D] → [B, Hq, Sq, D], laid out as [B, Sq, Hq, D]."""
    batch, heads, q_len, dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(batch, q_len, heads, dim, dtype=q.dtype, device=q.device)
    kind = ""
    strides: tuple[int, ...] = (0, 0, 0, 0)
    some_mask = out
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "float"
        shown = mask if kind == "bool" else mask.float()
        shown = shown.expand(batch, heads, q_len, k.shape[2])
        some_mask, strides = shown.view(torch.uint8) if kind == "bool" else shown, shown.stride()
    if out.numel():
        target = target_of(q.device)
        dtype = str(q.dtype).removeprefix("torch.")
        spec = spec_for(target, heads // k.shape[1], dim, dtype, causal, window > 0, softcap > 0, kind)
        fn = kernel.load("dense_attention", emit(spec), target)
        fn[(-(-q_len // spec.rows), batch * heads)](
            q, k, v, some_mask, out, q_len, k.shape[2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *strides, heads, scale, softcap or 1.0, window,
            num_warps=spec.warps, num_stages=spec.stages, **kernel.OPTIONS,
        )  # fmt: skip
    return out.transpose(1, 2)
