"""Every emitted kernel at its default specialisation, with its argument types: for inspection and tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llm42c.codegen.device import Device
from llm42c.codegen.ops.registry import marked
from llm42c.codegen.triton import (
    all_reduce_norm,
    attention_combine,
    attention_plan,
    dense_attention,
    grouped_linear,
    kv_write,
    linear,
    norm,
    pod_attention,
    reduce,
    rotary,
    running,
    sample,
    silu_mul,
)
from llm42c.codegen.triton.kernel import Compiled, compile_ahead
from llm42c.codegen.triton.spec import DTYPES, SCHEDULERS, AttentionSpec, default_spec

_ATTENTION = {
    "q_ptr": "*T", "k_cache_ptr": "*T", "v_cache_ptr": "*T", "sinks_ptr": "*fp32", "out_ptr": "*T",
    "partial_ptr": "*fp32", "stats_ptr": "*fp32", "cu_seqlens_ptr": "*i32", "kv_lens_ptr": "*i32",
    "table_ptr": "*i32", "items_ptr": "*i32", "counts_ptr": "*i32", "counters_ptr": "*i32",
    "sm_order_ptr": "*i32", "plan_ptr": "*i32",
    "scale": "fp32", "softcap": "fp32",
}  # fmt: skip
_SAMPLE = {
    "sorted_ptr": "*T", "index_ptr": "*i64", "token_ptr": "*i64",
    "temperature_ptr": "*fp32", "top_k_ptr": "*i32", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32",
    "seed_ptr": "*i64", "position_ptr": "*i64",
}  # fmt: skip
_DENSE = {
    "counters_ptr": "*i32", "sm_order_ptr": "*i32",
    **{
        f"{role}{name}": kind
        for role in ("", "decode_")
        for name, kind in (("mask_ptr", "*u8"), ("first_ptr", "*i32"), ("scale", "fp32"), ("softcap", "fp32"))
    },
}  # fmt: skip
_GROUPED = dict.fromkeys(("order_ptr", "tile_expert_ptr", "tile_first_ptr", "expert_end_ptr"), "*i32")


def _cost(found: Compiled) -> tuple[bool, int]:
    """What speaks against a variant: more shared memory than there is, and spills."""
    return found.resources.shared > found.device.get("shared_bytes", 1 << 30), found.resources.spills


@dataclass(frozen=True)
class Kernel:
    """Text, entry point and launch of one kernel. ``types`` of arguments that are neither T* nor int32."""

    label: str
    name: str
    source: str
    dtype: str
    warps: int = 4
    stages: int = 2
    types: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, int] = field(default_factory=dict)
    all_registers: bool = False
    variants: tuple[Kernel, ...] = ()  # others with the same bits, to be taken if this one spills

    def compile(self, device: Device) -> Compiled:
        """Ahead of time, for a device that need not be here: the first variant that fits and does not spill.

        If none does, the one that spills least.
        """
        best = self._compile(device)
        for other in self.variants:
            if _cost(best) == (False, 0):
                break
            best = min(best, other._compile(device), key=_cost)
        return best

    def _compile(self, device: Device) -> Compiled:
        element = DTYPES[self.dtype]

        class Types(dict[str, str]):
            def __missing__(self, argument: str) -> str:
                return f"*{element}" if argument.endswith("_ptr") else "i32"

        types = Types({n: t.replace("*T", f"*{element}") for n, t in self.types.items()})
        return compile_ahead(
            self.name,
            self.source,
            types,
            device,
            constants=self.constants,
            warps=self.warps,
            stages=self.stages,
            all_registers=self.all_registers,
        )


def attention_kernel(spec: AttentionSpec) -> Kernel:
    """The hybrid kernel of one specialisation, with its variants."""
    label = f"pod_attention/{spec.scheduler}/{'uniform' if spec.uniform else 'roles'}/d{spec.head_dim}"
    label += "" if spec.layout == "cache" else f"/{spec.layout}"
    first, *others = (
        Kernel(label, "pod_attention", pod_attention.emit(s), s.dtype, s.warps, s.stages, _ATTENTION)
        for s in spec.variants()
    )
    whole = [dataclasses.replace(kernel, all_registers=True) for kernel in (first, *others)]
    return dataclasses.replace(whole[0], variants=tuple(whole[1:]))


def fitted(spec: AttentionSpec, device: Device) -> AttentionSpec:
    """The variant of a specialisation that spills least on a device; from the cache, if it is known."""
    best: tuple[tuple[bool, int], AttentionSpec] | None = None
    for variant in spec.variants():
        kernel = dataclasses.replace(attention_kernel(variant), variants=())
        cost = _cost(kernel.compile(device))
        if best is None or cost < best[0]:
            best = (cost, variant)
        if cost == (False, 0):
            break
    return best[1] if best else spec


def kernels(device: Device, dtype: str = "bfloat16", head_dim: int = 128, page: int = 16) -> Iterator[Kernel]:
    """The kernels that a Llama-3-8B runs, for ``target``; and those that implementations name themselves."""
    shape = {"heads": 32, "kv_heads": 8, "head_dim": head_dim, "page": page, "dtype": dtype}
    for scheduler in SCHEDULERS:
        for uniform in (True, False):
            yield attention_kernel(default_spec(device, **shape, scheduler=scheduler, uniform=uniform))  # type: ignore[arg-type]
    for layout in ("pool", "rows"):
        yield attention_kernel(default_spec(device, **shape, layout=layout))  # type: ignore[arg-type]
    spec = default_spec(device, **shape)  # type: ignore[arg-type]
    sizes = {"SEQUENCES": 256}
    yield Kernel(
        "attention_plan",
        "attention_plan",
        attention_plan.emit(spec),
        dtype,
        types=_ATTENTION,
        constants=sizes,
    )
    yield Kernel(
        "attention_combine", "attention_combine", attention_combine.emit(spec), dtype, types=_ATTENTION
    )
    yield Kernel("kv_write", "kv_write", kv_write.emit(spec), dtype, 1, types={"slot_mapping_ptr": "*i64"})
    for rows in linear.buckets(device):
        product = linear.spec_for(device, rows, dtype, packed=True, bias=False)
        source = linear.emit(product)
        yield Kernel(f"linear/m{product.rows}", "linear", source, dtype, product.warps, product.stages)
    product = linear.spec_for(device, 16, dtype, packed=False, bias=False)
    source, name = grouped_linear.emit(product), "grouped_linear"
    along_k = {"w_stride_k": 1}
    yield Kernel(name, name, source, dtype, product.warps, product.stages, _GROUPED, along_k)
    for residual in (False, True):
        row = norm.NormSpec(4096, dtype, residual=residual, cast_first=True)
        label = "add_rms_norm" if residual else "rms_norm"
        floats = {"eps": "fp32", "offset": "fp32"}
        yield Kernel(label, "norm", norm.emit(row), dtype, row.warps, types=floats)
    yield Kernel("silu_mul", "silu_mul", silu_mul.emit(), dtype)
    yield Kernel("rotary", "rotary", rotary.emit(head_dim, head_dim), dtype, 1)
    for name in ("row_sum", "row_softmax", "row_log_softmax"):
        yield Kernel(name, name, reduce.emit(name, reduce.block(4096)), dtype)
    for name in ("running_sum", "running_product"):
        yield Kernel(name, name, running.emit(name), dtype, 2)
    yield from dense_kernels(device, dtype, head_dim)
    yield Kernel("sample", "sample", sample.emit(), "float32", types=_SAMPLE, all_registers=True)
    logprobs = {"token_ptr": "*i64", "y_ptr": "*fp32"}
    yield Kernel("token_logprobs", "token_logprobs", sample.emit_logprobs(), "float32", types=logprobs)
    yield from fused_kernels(device, dtype)
    for implementation in marked("cuda"):
        if implementation.kernels is not None:
            yield from implementation.kernels(device)


def dense_kernels(device: Device, dtype: str, head_dim: int) -> Iterator[Kernel]:
    """Attention over dense keys."""
    causal = dense_attention.spec_for(device, 4, head_dim, dtype, True, False, False, "")
    masked = dense_attention.spec_for(device, 4, head_dim, dtype, False, False, False, "bool")
    for label, spec in (("", causal), ("/mask", masked)):
        source = dense_attention.emit(spec)
        label = f"dense_attention{label}"
        yield Kernel(
            label, "dense_attention", source, dtype, spec.warps, spec.stages, _DENSE, all_registers=True
        )


def fused_kernels(device: Device, dtype: str) -> Iterator[Kernel]:
    """Collectives over symmetric memory."""
    tables = {"buffers": "i64", "signals": "i64", "multicast": "i64", "eps": "fp32", "offset": "fp32"}
    for form in all_reduce_norm.FORMS:
        fused = all_reduce_norm.FusedSpec(4096, dtype, 8, form)
        source = all_reduce_norm.emit(fused)
        label = f"all_reduce_norm/{form}"
        yield Kernel(label, "all_reduce_norm", source, dtype, fused.warps, types=tables)
    if device.kind == "cuda" and device.capability >= 90:
        source = all_reduce_norm.emit_multimem(4096, 8)
        yield Kernel("multimem_sum", "multimem_sum", source, dtype, types=tables)
