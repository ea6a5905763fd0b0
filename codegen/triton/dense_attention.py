"""Scaled dot-product attention on a GPU: one program a tile of queries and head (``dense_tile.py``)."""

from __future__ import annotations

import functools

from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import dense_tile, kernel
from llm42c.codegen.triton.dense_tile import DenseSpec, wrapped
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.source import module

_KERNEL = '''
@triton.jit(do_not_specialize=[
@FREE@
])
def dense_attention(
@ARGUMENTS@
):
    """q: [B, Hq, Sq, D], k, v: [B, Hkv, Sk, D], out: [B, Sq, Hq, D]. Program (tile of queries, B · Hq)."""
    attend(
@PASSED@
        tl.program_id(0), tl.program_id(1),
    )
'''


@functools.cache
def emit(spec: DenseSpec) -> str:
    """The file of one specialisation; its kernel is ``dense_attention``."""
    free = wrapped(tuple(f'"{name}"' for name in dense_tile.FREE))
    text = _KERNEL.replace("@FREE@", free).replace("@ARGUMENTS@", wrapped(dense_tile.ARGUMENTS))
    text = text.replace("@PASSED@", wrapped(dense_tile.ARGUMENTS, by=8))
    constants = dense_tile.constants(spec)
    parts = (*dense_tile.helpers(), dense_tile.tile(spec), text)
    return module("Attention in a fixed order", spec.subject(), constants, *parts)


def launch(call: dense_tile.Call) -> None:
    """Fill ``call.out``."""
    if call.out.numel():
        device, spec = device_of(call.out.device), call.spec
        fn = kernel.load("dense_attention", emit(spec), device)
        grid = (call.tiles, call.heads)
        options = {**kernel.OPTIONS, **kernel.registers_for(device, spec.warps)}
        fn[grid](*call.arguments, num_warps=spec.warps, num_stages=spec.stages, **options)


@implements("dense_attention", "cuda")
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
    call = dense_tile.prepare(device_of(q.device), q, k, v, mask, scale, causal, window, softcap)
    launch(call)
    return call.out.transpose(1, 2)
