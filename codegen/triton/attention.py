"""Launches of the attention kernels: workspaces, the work list of a step, the four kernels of a layer.

A :class:`Plan` belongs to the metadata of one step. Calls inside one :func:`step` share the plans made from
the same tensors; a call outside builds its own. Nothing is kept between steps, so a captured CUDA graph
holds the building of its own plan, and its own counters.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.ops.pod_attention import check_metadata
from llm42c.codegen.triton import attention_combine, attention_plan, kernel, kv_write
from llm42c.codegen.triton import pod_attention as hybrid
from llm42c.codegen.triton.cost import Choice, Composition, choose
from llm42c.codegen.triton.devices import target_of
from llm42c.codegen.triton.spec import AttentionSpec, default_spec, power_of_two, with_scheduler

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
    counters: Tensor | None = None


_current: ContextVar[_Step | None] = ContextVar("llm42_attention_step", default=None)


@contextlib.contextmanager
def step() -> Iterator[None]:
    """Calls inside share work lists. The metadata tensors must not change before its end."""
    token = _current.set(_Step())
    try:
        yield
    finally:
        _current.reset(token)


def counters_of(device: torch.device) -> Tensor:
    """The counters of the current stream: zero between launches, because the last program zeroes them.

    A graph that is being captured gets counters of its own, zeroed in the graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        scope = _current.get() or _Step()
        if scope.counters is None:
            scope.counters = torch.zeros(hybrid.COUNTERS, dtype=torch.int32, device=device)
        return scope.counters
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device.index or 0, stream)
    with _lock:
        if key not in _counters:
            _counters[key] = torch.zeros(hybrid.COUNTERS, dtype=torch.int32, device=device)
        return _counters[key]


def make_plan(
    spec: AttentionSpec, tokens: int, cu_seqlens_q: Tensor, kv_lens: Tensor, table_width: int
) -> Plan:
    """Build the work list on the device. Sizes come from shapes alone, so a captured graph can replay it."""
    sequences = kv_lens.shape[0]
    device = kv_lens.device
    most_splits = -(-table_width * spec.page // spec.split)
    tiles = -(-tokens * spec.group // (spec.rows // spec.group * spec.group)) + sequences
    slots = max(1, min(sequences, tokens) * most_splits)
    items = torch.empty(tiles + slots, 4, dtype=torch.int32, device=device)
    plan = torch.empty(max(sequences, 1), 2, dtype=torch.int32, device=device)
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    if sequences:
        fn = kernel.load("attention_plan", attention_plan.emit(spec), target_of(device))
        fn[(sequences,)](
            cu_seqlens_q, kv_lens, items, plan, counts, sequences, tiles,
            SEQUENCES=power_of_two(max(sequences, 2)), num_warps=4,
        )  # fmt: skip
    return Plan(items, plan, counts, tiles, slots, (cu_seqlens_q, kv_lens))


def plan_of(
    spec: AttentionSpec, tokens: int, cu_seqlens_q: Tensor, kv_lens: Tensor, table_width: int
) -> Plan:
    """The plan made for an earlier layer of this :func:`step`, or a new one."""
    scope = _current.get()
    if scope is None:
        return make_plan(spec, tokens, cu_seqlens_q, kv_lens, table_width)
    tiles = (spec.window, spec.rows, spec.decode_rows, spec.split, spec.group, spec.page)
    key = (id(cu_seqlens_q), id(kv_lens), tokens, table_width, *tiles)
    if key not in scope.plans:
        scope.plans[key] = make_plan(spec, tokens, cu_seqlens_q, kv_lens, table_width)
    return scope.plans[key]


def composition(spec: AttentionSpec, tokens: int, sequences: int, table_width: int) -> Composition:
    """What shapes tell of a batch: the lengths themselves are on the device."""
    keys = max(1, table_width * spec.page // 2)
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
    fn = kernel.load("kv_write", kv_write.emit(spec), target_of(k.device))
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
    block_table: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    *,
    sm_order: Tensor | None = None,
) -> Tensor:
    """The hybrid kernel and the fold of its splits. q: [T, Hq, D] → [T, Hq, D]; rows of no sequence are 0.

    ``sm_order`` [programs] int32 says which SM a program thinks it runs on, where ``spec.smid`` is off.
    """
    target = target_of(q.device)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    sequences = kv_lens.shape[0]
    if not sequences or not len(q):
        return out
    lines = plan.slots * spec.kv_heads * spec.decode_rows
    partial = torch.empty(lines * spec.head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(lines * 2, dtype=torch.float32, device=q.device)
    some_sinks = stats if sinks is None else sinks.float().contiguous()
    programs = choice.programs or plan.items_at_most() * spec.kv_heads
    if sm_order is None:
        sm_order = plan.counts if spec.smid else _round_robin(programs, spec.sms, q.device)
    run = kernel.load("pod_attention", hybrid.emit(spec), target)
    run[(programs,)](
        q, k_cache, v_cache, some_sinks, out, partial, stats,
        cu_seqlens_q, kv_lens, block_table, plan.items, plan.counts, counters_of(q.device), sm_order,
        q.stride(0), q.stride(1), block_table.stride(0), plan.decode_base, scale, softcap or 1.0,
        choice.prefill_share, choice.decode_share, 1,
        num_warps=spec.warps, num_stages=spec.stages, **kernel.OPTIONS,
    )  # fmt: skip
    combine = kernel.load("attention_combine", attention_combine.emit(spec), target)
    combine[(sequences, spec.kv_heads)](
        partial, stats, some_sinks, out, cu_seqlens_q, plan.sequences, out.stride(0),
        num_warps=4, **kernel.OPTIONS,
    )  # fmt: skip
    return out


_orders: dict[tuple[int, int, str], Tensor] = {}


def _round_robin(programs: int, sms: int, device: torch.device) -> Tensor:
    key = (programs, sms, str(device))
    if key not in _orders:
        _orders[key] = torch.arange(programs, dtype=torch.int32, device=device) % sms
    return _orders[key]


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
    """``llm42::paged_attention`` and ``llm42::pod_attention`` on a GPU: one set of bits."""
    spec = default_spec(
        target_of(q.device),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        page=k_cache.shape[3],
        dtype=str(q.dtype).removeprefix("torch."),
        window=window,
        softcap=softcap > 0,
        sinks=sinks is not None,
    )
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    target = target_of(q.device)
    shape = composition(spec, q.shape[0], kv_lens.shape[0], block_table.shape[1])
    choice = choose(shape, spec, target)
    spec = with_scheduler(spec, choice.scheduler)
    write_kv(spec, k, v, k_cache, v_cache, slot_mapping)
    plan = plan_of(spec, q.shape[0], cu_seqlens_q, kv_lens, block_table.shape[1])
    return attend(
        spec, plan, choice, q, k_cache, v_cache, cu_seqlens_q, kv_lens, block_table, scale, softcap, sinks
    )


def pod_attention(
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
    checked: bool,
) -> Tensor:
    """``llm42::pod_attention``. Raises ValueError if ``checked`` and the metadata does not fit together."""
    if checked:
        pages, page = k_cache.shape[0], k_cache.shape[3]
        check_metadata(pages, page, q.shape[0], slot_mapping, cu_seqlens_q, kv_lens, block_table)
    return paged_attention(
        q,
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        cu_seqlens_q,
        kv_lens,
        block_table,
        scale,
        window,
        softcap,
        sinks,
    )
