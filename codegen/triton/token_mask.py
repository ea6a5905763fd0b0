"""Masks over tokens on a GPU: one program a row and a block of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm42c.codegen.device import Device
from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module

if TYPE_CHECKING:
    from llm42c.codegen.triton.catalog import Kernel

_BLOCK = 1024


@functools.cache
def emit() -> str:
    """The file; its kernel is ``apply_token_mask``."""
    text = fold("token_mask", "apply_token_mask")
    return module("Logits of tokens that may come", "any row", {"BLOCK": _BLOCK}, text)


def kernels(device: Device) -> Iterator[Kernel]:
    from llm42c.codegen.triton.catalog import Kernel

    types = {"mask_ptr": "*i32"}
    for dtype in ("bfloat16", "float32"):
        yield Kernel(f"apply_token_mask/{dtype}", "apply_token_mask", emit(), dtype, types=types)


@implements("apply_token_mask", "cuda", kernels=lambda device: kernels(device))
def apply_token_mask(logits: Tensor, mask: Tensor) -> Tensor:
    """``llm42::apply_token_mask``. logits: [R, V], mask: [R, ceil(V / 32)] int32 → [R, V]."""
    if logits.dim() != 2 or mask.shape != (logits.shape[0], -(-logits.shape[1] // 32)):
        raise ValueError(
            f"apply_token_mask: expected logits [R, V] and mask [R, ceil(V / 32)], got {tuple(logits.shape)} "
            f"and {tuple(mask.shape)}"
        )
    if mask.dtype != torch.int32 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            "apply_token_mask: expected logits of float32, bfloat16 or float16 and mask of int32, got "
            f"{logits.dtype} and {mask.dtype}"
        )
    rows, words = kernel.aligned(logits.contiguous()), kernel.aligned(mask.contiguous())
    out = torch.empty_like(rows)
    if out.numel():
        fn = kernel.load("apply_token_mask", emit(), device_of(logits.device))
        size = rows.shape[1]
        grid = (len(rows), -(-size // _BLOCK))
        fn[grid](rows, words, out, size, words.shape[1], num_warps=4, **kernel.OPTIONS)
    return out
