"""Two independent calls of dense attention in one launch: the tiles of both, mixed on every SM.

As POD-Attention (Kamath et al., ASPLOS 2025), over dense keys: one program a tile; each SM's programs take
tiles of the two calls in turn, by tickets, in proportion to their numbers. A tile is that of
``dense_attention``, so both results have the bits of their own calls.
"""

from __future__ import annotations

import functools

from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import dense_attention, dense_tile, fragments, kernel
from llm42c.codegen.triton.attention import counters_of
from llm42c.codegen.triton.cost import shares
from llm42c.codegen.triton.dense_tile import ARGUMENTS, DenseSpec, wrapped
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module

_KERNEL = '''
@triton.jit(do_not_specialize=[
@FREE@
])
def pod_dense_attention(
@PREFILL@
@DECODE@
    counters_ptr, sm_order_ptr, prefill_tiles, prefill_lines, decode_lines, prefills, decodes,
    prefill_share, decode_share,
):
    """One tile a program. Shapes as in dense_attention, twice; the last tile of a prefill has most keys."""
    program = tl.program_id(0)
    sm = @SM@
@TICKET@
    if role == 0:
        attend_prefill(
@PREFILL_PASSED@
            prefill_tiles - 1 - index // prefill_lines, index % prefill_lines,
        )
    elif role == 1:
        attend_decode(
@DECODE_PASSED@
            index // decode_lines, index % decode_lines,
        )
@RESET@
'''
_COUNTS = (
    "prefill_tiles", "prefill_lines", "decode_lines", "prefills", "decodes", "prefill_share", "decode_share",
)  # fmt: skip


@functools.cache
def emit(prefill: DenseSpec, decode: DenseSpec, sm: str = "register", sms: int = 132) -> str:
    """The file of one pair; its kernel is ``pod_dense_attention``. ``sm`` as in ``AttentionSpec``."""
    free = (*dense_tile.FREE, *(f"decode_{name}" for name in dense_tile.FREE), *_COUNTS)
    text = _KERNEL.replace("@FREE@", wrapped(tuple(f'"{name}"' for name in free)))
    text = text.replace("@SM@", fragments.SM[sm])
    text = text.replace("@TICKET@", fragments.indent(fragments.TICKET, 4))
    text = text.replace("@RESET@", fragments.indent(fragments.RESET, 4))
    text = text.replace("@PREFILL@", wrapped(ARGUMENTS)).replace("@PREFILL_PASSED@", wrapped(ARGUMENTS, 12))
    text = text.replace("@DECODE@", wrapped(ARGUMENTS, prefix="decode_"))
    text = text.replace("@DECODE_PASSED@", wrapped(ARGUMENTS, 12, "decode_"))
    constants = {
        **dense_tile.constants(prefill, "PREFILL_"),
        **dense_tile.constants(decode, "DECODE_"),
        **fragments.COUNTER_CONSTANTS,
    }
    if sm == "program":
        constants["SMS"] = sms
    return module(
        "Two calls of attention in one launch",
        f"{prefill.subject()},\nand {decode.subject()}",
        constants,
        *dense_tile.helpers(),
        dense_tile.tile(prefill, "attend_prefill", "PREFILL_"),
        dense_tile.tile(decode, "attend_decode", "DECODE_"),
        fold("attention_parts", "draw"),
        text,
        imports=fragments.IMPORT_SMID if sm == "register" else "",
    )


def launch(prefill: dense_tile.Call, decode: dense_tile.Call, sm_order: Tensor | None = None) -> None:
    """Fill the results of both calls, which must have one number of warps.

    ``sm_order`` [programs] int32 says which SM a program thinks it runs on, instead of the hardware.
    """
    device = prefill.out.device
    gpu = device_of(device)
    counts = (prefill.tiles * prefill.heads, decode.tiles * decode.heads)
    counters = counters_of(device)
    sm = "table" if sm_order is not None else "register" if gpu.kind == "cuda" else "program"
    source = emit(prefill.spec, decode.spec, sm, gpu.count("sms", 132))
    fn = kernel.load("pod_dense_attention", source, gpu)
    fn[(sum(counts),)](
        *prefill.arguments, *decode.arguments, counters, counters if sm_order is None else sm_order,
        prefill.tiles, prefill.heads, decode.heads, *counts, *shares(counts[0] / sum(counts)),
        num_warps=prefill.spec.warps, num_stages=prefill.spec.stages, **kernel.OPTIONS,
        **kernel.registers_for(gpu, prefill.spec.warps),
    )  # fmt: skip


@implements("pod_dense_attention", "cuda")
def pod_dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    decode_q: Tensor,
    decode_k: Tensor,
    decode_v: Tensor,
    decode_mask: Tensor | None,
    decode_scale: float,
    decode_causal: bool,
    decode_window: int,
    decode_softcap: float,
    decode_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """``llm42::pod_dense_attention``; ``decode_workers`` is for CPUs.

    Calls that need different numbers of warps for their bits, and empty ones, are launched one by one.
    """
    device = device_of(q.device)
    prefill = dense_tile.prepare(device, q, k, v, mask, scale, causal, window, softcap)
    decode = dense_tile.prepare(
        device, decode_q, decode_k, decode_v, decode_mask, decode_scale, decode_causal, decode_window,
        decode_softcap,
    )  # fmt: skip
    both = prefill.out.numel() and decode.out.numel()
    if both and prefill.spec.warps == decode.spec.warps and q.dtype == decode_q.dtype:
        launch(prefill, decode)
    else:
        dense_attention.launch(prefill)
        dense_attention.launch(decode)
    return prefill.out.transpose(1, 2), decode.out.transpose(1, 2)
