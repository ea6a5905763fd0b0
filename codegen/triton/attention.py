"""Launches of the attention kernels: workspaces, the work list of a step, the four kernels of a layer.

A :class:`Plan` belongs to the metadata of one step. Calls inside one :func:`step` share the plans made from
the same tensors; a call outside builds its own. Nothing is kept between steps, so a captured CUDA graph
holds the building of its own plan, and its own counters. What was made outside of a capture is not used
inside of it, nor the other way round.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import attention_combine, attention_plan, fragments, kernel, kv_write
from llm42c.codegen.triton import pod_attention as hybrid
from llm42c.codegen.triton.cost import Choice, Composition, choose
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.spec import AttentionSpec, default_spec, power_of_two, with_scheduler

WORKSPACE_BYTES = 256 << 20  # of partial results of a call; sequences for which it has no room are not split

_lock = threading.Lock()
_counters: dict[tuple[int, int], Tensor] = {}


@dataclass(frozen=True)
class Plan:
    """The work list of one step. items: [N, 4], plan: [S, 2], counts: [2], all int32."""

    items: Tensor
    sequences: Tensor
    counts: Tensor
    decode_base: int
    slots: int
    metadata: tuple[Tensor, Tensor]  # held, so that their ids stay theirs

    def items_at_most(self) -> int:
        return self.items.shape[0]


@dataclass
class _Step:
    plans: dict[tuple[Any, ...], Plan] = field(default_factory=dict)
    counters: dict[int, Tensor] = field(default_factory=dict)  # by stream, of the graph being captured


_current: ContextVar[_Step | None] = ContextVar("llm42_attention_step", default=None)


@contextlib.contextmanager
def step() -> Iterator[None]:
    """Calls inside share work lists. The metadata tensors must not change before its end."""
    token = _current.set(_Step())
    try:
        yield
    finally:
        _current.reset(token)


def capturing(device: torch.device) -> bool:
    """Whether launches on the current stream are recorded for a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def counters_of(device: torch.device) -> Tensor:
    """The counters of the current stream: zero between launches, because the last program zeroes them.

    A graph that is being captured gets counters of its own, zeroed in the graph; one set a stream of it, as
    branches of a graph run at the same time.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if capturing(device):
        kept = (_current.get() or _Step()).counters
        if stream not in kept:
            kept[stream] = torch.zeros(fragments.COUNTERS, dtype=torch.int32, device=device)
        return kept[stream]
    key = (device.index or 0, stream)
    with _lock:
        if key not in _counters:
            _counters[key] = torch.zeros(fragments.COUNTERS, dtype=torch.int32, device=device)
        return _counters[key]


def slots_for(spec: AttentionSpec, tokens: int, sequences: int, most_keys: int) -> int:
    """Partial results that a call has room for: all that there can be, or what the workspace holds."""
    line = spec.kv_heads * spec.decode_rows * (spec.head_dim + 2) * 4
    most = min(sequences, tokens) * -(-most_keys // spec.split)
    return max(1, min(most, WORKSPACE_BYTES // line))


def make_plan(
    spec: AttentionSpec,
    tokens: int,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    most_keys: int,
    slots: int | None = None,
) -> Plan:
    """Build the work list on the device; no sequence has more than ``most_keys``.

    Sizes come from shapes alone, so a captured graph can replay it.
    """
    sequences = kv_lens.shape[0]
    device = kv_lens.device
    tiles = -(-tokens * spec.group // (spec.rows // spec.group * spec.group)) + sequences
    slots = slots_for(spec, tokens, sequences, most_keys) if slots is None else slots
    items = torch.empty(tiles + slots + sequences, 4, dtype=torch.int32, device=device)
    plan = torch.empty(max(sequences, 1), 2, dtype=torch.int32, device=device)
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    if sequences:
        fn = kernel.load("attention_plan", attention_plan.emit(spec), device_of(device))
        fn[(sequences,)](
            cu_seqlens_q, kv_lens, items, plan, counts, sequences, tiles, slots,
            SEQUENCES=power_of_two(max(sequences, 2)), num_warps=4,
        )  # fmt: skip
    return Plan(items, plan, counts, tiles, slots, (cu_seqlens_q, kv_lens))


def plan_of(spec: AttentionSpec, tokens: int, cu_seqlens_q: Tensor, kv_lens: Tensor, most_keys: int) -> Plan:
    """The plan made for an earlier layer of this :func:`step`, or a new one."""
    scope = _current.get()
    if scope is None:
        return make_plan(spec, tokens, cu_seqlens_q, kv_lens, most_keys)
    slots = slots_for(spec, tokens, kv_lens.shape[0], most_keys)
    shape = (spec.window, spec.rows, spec.decode_rows, spec.split, spec.group, slots)
    key = (capturing(kv_lens.device), id(cu_seqlens_q), id(kv_lens), tokens, *shape)
    if key not in scope.plans:
        scope.plans[key] = make_plan(spec, tokens, cu_seqlens_q, kv_lens, most_keys)
    return scope.plans[key]


def composition(spec: AttentionSpec, tokens: int, sequences: int, most_keys: int) -> Composition:
    """What shapes tell of a batch: the lengths themselves are on the device."""
    keys = max(1, most_keys // 2)
    if tokens <= sequences * spec.decode_tokens:
        return Composition(decode_rows=sequences, decode_keys=keys)
    decodes = max(0, sequences - 1)
    return Composition(max(1, tokens - decodes), keys, decodes, keys)


def write_kv(
    spec: AttentionSpec, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    """Write the keys and values of a call. k, v: [T, Hkv, D]."""
    if not len(slots):
        return
    k, v = kernel.aligned(k), kernel.aligned(v)
    fn = kernel.load("kv_write", kv_write.emit(spec), device_of(k.device))
    strides = (k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    fn[(len(slots), spec.kv_heads)](k, v, k_cache, v_cache, slots, *strides, num_warps=1)


def attend(
    spec: AttentionSpec,
    plan: Plan,
    choice: Choice,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    table: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    *,
    sm_order: Tensor | None = None,
) -> Tensor:
    """The hybrid kernel and the fold of its splits. q: [T, Hq, D] → [T, Hq, D]; rows of no sequence are 0.

    ``table`` is ``block_table``, or ``cu_seqlens_k`` where keys lie in packed rows. ``sm_order`` [programs]
    int32 says which SM a program thinks it runs on, where ``spec.sm`` is ``table``.
    """
    device = device_of(q.device)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    sequences = kv_lens.shape[0]
    if not sequences or not len(q):
        return out
    q = kernel.aligned(q)
    lines = plan.slots * spec.kv_heads * spec.decode_rows
    partial = torch.empty(lines * spec.head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(lines * 2, dtype=torch.float32, device=q.device)
    some_sinks = stats if sinks is None else kernel.aligned(sinks.float().contiguous())
    programs = choice.programs or plan.items_at_most() * spec.kv_heads
    run = kernel.load("pod_attention", hybrid.emit(spec), device)
    run[(programs,)](
        q, k_cache, v_cache, some_sinks, out, partial, stats,
        cu_seqlens_q, kv_lens, table, plan.items, plan.counts, counters_of(q.device),
        plan.counts if sm_order is None else sm_order,
        q.stride(0), q.stride(1), table.stride(0), plan.decode_base, scale, softcap or 1.0,
        choice.prefill_share, choice.decode_share, 1,
        num_warps=spec.warps, num_stages=spec.stages, **kernel.OPTIONS,
        **kernel.registers_for(device, spec.warps),
    )  # fmt: skip
    combine = kernel.load("attention_combine", attention_combine.emit(spec), device)
    combine[(sequences, spec.kv_heads)](
        partial, stats, some_sinks, out, cu_seqlens_q, plan.sequences, out.stride(0),
        num_warps=4, **kernel.OPTIONS,
    )  # fmt: skip
    return out


@functools.cache
def _fitted(spec: AttentionSpec, device: torch.device) -> AttentionSpec:
    """The variant that spills least here; the first one, if the assembler that tells is of no use."""
    from llm42c.codegen.triton import catalog

    try:
        return catalog.fitted(spec, device_of(device))
    except (RuntimeError, ValueError):
        return spec


def _run(
    spec: AttentionSpec,
    most_keys: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    table: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Schedule by the cost model, make or find the plan, attend."""
    shape = composition(spec, q.shape[0], kv_lens.shape[0], most_keys)
    choice = choose(shape, spec, device_of(q.device))
    spec = with_scheduler(spec, choice.scheduler)
    spec = _fitted(spec, q.device) if q.is_cuda else spec
    plan = plan_of(spec, q.shape[0], cu_seqlens_q, kv_lens, most_keys)
    return attend(spec, plan, choice, q, k, v, cu_seqlens_q, kv_lens, table, scale, softcap, sinks)


@implements("paged_attention", "cuda")
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """``llm42::paged_attention`` on a GPU."""
    spec = default_spec(
        device_of(q.device),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        page=k_cache.shape[3],
        dtype=str(q.dtype).removeprefix("torch."),
        window=window,
        softcap=softcap > 0,
        sinks=sinks is not None,
    )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("paged_attention: expected contiguous caches of keys and values")
    write_kv(spec, k, v, k_cache, v_cache, slot_mapping)
    most_keys = block_table.shape[1] * spec.page
    where = (cu_seqlens_q, kv_lens, block_table)
    return _run(spec, most_keys, q, k_cache, v_cache, *where, scale, softcap, sinks)


@implements("varlen_attention", "cuda")
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """``llm42::varlen_attention`` on a GPU. Metadata is trusted; raises ValueError for other mistakes."""
    table = cu_seqlens_k if block_table is None else block_table
    if table is None or (cu_seqlens_k is not None and block_table is not None):
        raise ValueError("varlen_attention: expected either cu_seqlens_k or block_table")
    if k.dim() != (3 if block_table is None else 4) or k.shape != v.shape:
        raise ValueError(f"varlen_attention: k {tuple(k.shape)} and v {tuple(v.shape)} do not fit a table")
    k, v = kernel.aligned(k), kernel.aligned(v)
    strides = tuple(n for x in (k, v) for n in (x.stride(0), x.stride(-3), x.stride(-2)))
    spec = default_spec(
        device_of(q.device),
        heads=q.shape[1],
        kv_heads=k.shape[-2],
        head_dim=q.shape[2],
        page=16 if block_table is None else k.shape[1],
        dtype=str(q.dtype).removeprefix("torch."),
        window=window,
        softcap=softcap > 0,
        sinks=sinks is not None,
        layout="rows" if block_table is None else "pool",
        strides=strides,
    )
    most_keys = k.shape[0] if block_table is None else block_table.shape[1] * spec.page
    return _run(spec, most_keys, q, k, v, cu_seqlens_q, kv_lens, table, scale, softcap, sinks)
