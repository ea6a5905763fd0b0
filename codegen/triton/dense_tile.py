"""The tile of attention over dense keys and values, in the order of the paged kernel, with a mask.

Keys in blocks from the first key that the mask shows to any row of the sequence, so that padding on either
side changes nothing; an online softmax inside a split, splits folded from the left. One tile for every
number of queries, so a row's bits do not depend on ``B``, ``Sq`` or ``Sk``. The value of a key that is hidden
from all rows of a tile is not read; one that is hidden from some of them must be finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm42c.codegen.device import Device
from llm42c.codegen.triton import fragments, kernel
from llm42c.codegen.triton.spec import DTYPES, power_of_two, tiles

POINTERS = ("q_ptr", "k_ptr", "v_ptr", "mask_ptr", "first_ptr", "out_ptr")
BATCH = ("q_len", "kv_len", "heads")  # follow the batch
STRIDES = tuple(f"{x}_stride_{d}" for x in "qkv" for d in "bht")
MASK_STRIDES = ("mask_stride_b", "mask_stride_h", "mask_stride_q", "mask_stride_k")
NUMBERS = ("scale", "softcap", "window")
ARGUMENTS = (*POINTERS, *BATCH, *STRIDES, *MASK_STRIDES, *NUMBERS)
FREE = ("first_ptr", "mask_ptr", *BATCH, *MASK_STRIDES, "window")  # may be anything: not specialised

_TILE = '''
@triton.jit
def attend(
@ARGUMENTS@
    tile, batch_head,
):
    """ROWS queries of one head. q: [B, Hq, Sq, D], k, v: [B, Hkv, Sk, D], out: [B, Sq, Hq, D]."""
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < q_len
    position = row if CAUSAL else row + (kv_len - q_len)
    dim = tl.arange(0, DIM)
    inside = live[:, None] & (dim < HEAD_DIM)[None, :]
    q_at = q_ptr + batch * q_stride_b + head * q_stride_h
    q_at = q_at + row.to(tl.int64)[:, None] * q_stride_t + dim[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)  # [M, D]
    k_at = k_ptr + batch * k_stride_b + head // GROUP * k_stride_h
    v_at = v_ptr + batch * v_stride_b + head // GROUP * v_stride_h
    end = kv_len
    if CAUSAL:
        end = tl.minimum(kv_len, tl.minimum(q_len, tile * ROWS + ROWS))
@FIRST@

    total_max = tl.full([ROWS], float("-inf"), tl.float32)
    total_sum = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DIM], tl.float32)
    for split in tl.range(first, end, SPLIT, num_stages=1, disable_licm=True):
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        high = tl.minimum(split + SPLIT, end)
        for start in tl.range(split, high, KEYS, num_stages=STAGES, disable_licm=True):
            key = start + tl.arange(0, KEYS)
            held = key < end
            k = tl.load(
                k_at + key[None, :].to(tl.int64) * k_stride_t + dim[:, None],
                mask=held[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
            )  # [D, N]
            score = tl.dot(q, k, input_precision="ieee")
@SCORE@
            seen = held[None, :] & live[:, None]
@SEEN@
            score = tl.where(seen, score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
            weight = tl.exp2(score - base[:, None])
            decay = tl.exp2(row_max - base)
            row_sum = tl.fma(row_sum, decay, tl.sum(weight, 1))
            acc = acc * decay[:, None]
            v = tl.load(
                v_at + key[:, None].to(tl.int64) * v_stride_t + dim[None, :],
                mask=@SHOWN@[:, None] & (dim < HEAD_DIM)[None, :], other=0.0,
            )  # [N, D]
            acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
            row_max = new_max
        total_max, total_sum, total = fold(total_max, total_sum, total, row_max, row_sum, acc)
    result = finish(total_max, total_sum, total, out_ptr, head)
    at_out = ((batch * q_len + row) * heads + head) * HEAD_DIM
    tl.store(out_ptr + at_out[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
'''
_CAUSAL = """
            seen = seen & (key[None, :] <= position[:, None])
"""
_WINDOW = """
            seen = seen & (key[None, :] > position[:, None] - window)
"""
_MASK_AT = """
            at = mask_ptr + batch * mask_stride_b + head * mask_stride_h
            at = at + row[:, None].to(tl.int64) * mask_stride_q + key[None, :].to(tl.int64) * mask_stride_k
"""
_BOOL = """
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
"""
_ADDED = """
            added = tl.load(at, mask=seen, other=0.0)
            seen = seen & (added != float("-inf"))
            score = score + added * LOG2E
"""
_SCALE = """
            score = score * (scale * LOG2E)
"""
_CAP = """
            capped = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2E * scale / softcap)))  # tanh
            score = capped * (softcap * LOG2E)
"""
_ANY = """
            shown = tl.max(seen.to(tl.int32), 0) > 0  # [N]
"""


@dataclass(frozen=True)
class DenseSpec:
    """One tile. ``mask``: "", "bool" or "float"."""

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

    def subject(self) -> str:
        """The tile in words."""
        return f"heads of {self.head_dim} in groups of {self.group}, {DTYPES[self.dtype]}"


def spec_for(
    device: Device,
    group: int,
    head_dim: int,
    dtype: str,
    causal: bool,
    window: bool,
    softcap: bool,
    mask: str,
) -> DenseSpec:
    """The tile for a device and head."""
    rows, keys, warps, _ = tiles(device, head_dim, dtype)
    rows, keys = min(rows, 32), min(keys, 32)  # the mask's and the keys' addresses need registers too
    return DenseSpec(group, head_dim, dtype, causal, window, softcap, mask, rows, keys, warps, stages=1)


def wrapped(names: tuple[str, ...], by: int = 4) -> str:
    """Arguments in lines of at most 108 columns."""
    lines, line = [], ""
    for name in names:
        item = f"{name}, "
        if len(line) + len(item) > 108 - by:
            lines.append(line)
            line = ""
        line += item
    return "\n".join(" " * by + x.rstrip() for x in (*lines, line))


def tile(spec: DenseSpec) -> str:
    """The function of a tile, ``attend``."""
    seen = (_CAUSAL if spec.causal else "") + (_WINDOW.lstrip("\n") if spec.window else "")
    if spec.mask:
        seen += _MASK_AT.lstrip("\n") + (_BOOL if spec.mask == "bool" else _ADDED).lstrip("\n")
    narrow = bool(spec.mask or spec.window)  # then a whole tile may not see a key
    text = _TILE.replace("@SCORE@", (_CAP if spec.softcap else _SCALE).strip("\n"))
    text = text.replace("@SEEN@\n", (seen + (_ANY.lstrip("\n") if narrow else "")).lstrip("\n"))
    text = text.replace("@SHOWN@", "shown" if narrow else "held")
    text = text.replace("@FIRST@", "    first = tl.load(first_ptr + batch)" if spec.mask else "    first = 0")
    return text.replace("@ARGUMENTS@", wrapped(ARGUMENTS))


def constants(spec: DenseSpec) -> dict[str, int | float | bool | str]:
    """What the function of :func:`tile` needs above it."""
    return {
        "GROUP": spec.group,
        "HEAD_DIM": spec.head_dim,
        "DIM": max(16, power_of_two(spec.head_dim)),
        "ROWS": spec.rows,
        "KEYS": spec.keys,
        "SPLIT": spec.split,
        "STAGES": spec.stages,
        "CAUSAL": spec.causal,
        "LOG2E": 1.4426950408889634,
    }


def helpers() -> tuple[str, str]:
    """Functions that a tile calls."""
    return fragments.states(sinks=False)


@dataclass(frozen=True)
class Call:
    """One call's arguments as the kernels take them, in the order of :data:`ARGUMENTS`."""

    spec: DenseSpec
    arguments: tuple[Tensor | int | float, ...]
    out: Tensor  # [B, Sq, Hq, D]
    tiles: int
    heads: int  # of all sequences


def prepare(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Call:
    """Choose the tile for a call and lay out its arguments. Raises ValueError."""
    batch, heads, q_len, dim = q.shape
    if k.shape != v.shape or k.dim() != 4 or k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[1]:
        raise ValueError(
            f"dense_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} "
            "do not fit together"
        )
    kind = "" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    dtype = str(q.dtype).removeprefix("torch.")
    spec = spec_for(device, heads // k.shape[1], dim, dtype, causal, window > 0, softcap > 0, kind)
    q, k, v = (kernel.aligned(x) for x in (q, k, v))
    out = torch.empty(batch, q_len, heads, dim, dtype=q.dtype, device=q.device)
    some_mask, first = out, out
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask = mask if kind == "bool" else mask.float()
        first = first_key(mask, batch)
        shown = mask.expand(batch, heads, q_len, k.shape[2])
        some_mask = shown.view(torch.uint8) if kind == "bool" else shown
        strides = shown.stride()
    numbers = (scale, softcap or 1.0, window)
    lengths = (q_len, k.shape[2], heads)
    tensors = (q, k, v, some_mask, first, out)
    integers: tuple[int, ...] = (*lengths, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides)
    return Call(spec, (*tensors, *integers, *numbers), out, -(-q_len // spec.rows), batch * heads)


def first_key(mask: Tensor, batch: int) -> Tensor:
    """The first key that a mask shows to any row, of each sequence: [B] int32; 0 if it shows none."""
    mask = mask[(None,) * (4 - mask.dim())]
    shown = mask if mask.dtype == torch.bool else mask != -torch.inf
    shown = shown.any(1).any(1)  # [B | 1, Sk | 1]
    return shown.int().argmax(-1).int().expand(batch).contiguous()
