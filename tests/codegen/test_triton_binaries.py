"""What launches and binaries must not depend on: the batch selects no other binary, instruction or layout."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm42c.codegen.triton import attention, dense_attention, devices, kernel, linear, norm, pod_attention
from llm42c.codegen.triton import sample as sampling
from llm42c.codegen.triton.spec import AttentionSpec, default_spec

H200 = devices.from_table("NVIDIA H200")
MASKED = dense_attention.spec_for(H200, 4, 128, "bfloat16", False, False, False, "bool")
MMA = re.compile(r"(wgmma\.mma_async\.\S+|mma\.sync\.\S+|tcgen05\.mma\.\S+)")


def llama(device: devices.Device = H200, **changes: Any) -> AttentionSpec:
    return default_spec(
        device, heads=32, kv_heads=8, head_dim=128, page=16, dtype="bfloat16", **changes
    )  # fmt: skip


def specialisations(fn: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What Triton would compile for: by argument, its type and what is known of it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    _, found, _ = binder(**arguments)
    return dict(zip(fn.arg_names, found, strict=True))


def arguments_of(fn: Any, **values: Any) -> dict[str, Any]:
    """A tensor for every pointer, 48 for every number, but for ``values``."""
    some = torch.empty(64, dtype=torch.bfloat16)
    return {n: values.get(n, some if n.endswith("_ptr") else 48) for n in fn.arg_names}


CASES = {
    "linear": ("m", lambda: linear.emit(linear.spec_for(H200, 1, "bfloat16", True, False))),
    "pod_attention": (
        "table_stride decode_base prefill_share decode_share one", lambda: pod_attention.emit(llama())
    ),
    "dense_attention": (
        "q_len kv_len heads mask_stride_k",
        lambda: dense_attention.emit(MASKED),
    ),
    "token_logprobs": ("columns", sampling.emit_logprobs),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_the_batch_select_no_binary(name: str):
    pytest.importorskip("triton")
    numbers, emit = CASES[name]
    fn = kernel.load(name, emit(), H200)
    kinds = [
        specialisations(fn, arguments_of(fn, **dict.fromkeys(numbers.split(), value)))
        for value in (1, 16, 17)
    ]
    assert kinds[0] == kinds[1] == kinds[2]
    # Control: a number that belongs to the weight or the model does.
    fixed = next(n for n in fn.arg_names if n in ("k", "q_stride_t", "size"))
    assert specialisations(fn, arguments_of(fn, **{fixed: 17})) != kinds[0]


def test_metadata_selects_no_binary():
    pytest.importorskip("triton")
    fn = kernel.load("pod_attention", pod_attention.emit(llama()), H200)
    odd = torch.empty(65, dtype=torch.int32)
    names = ("cu_seqlens_ptr", "kv_lens_ptr", "table_ptr")
    one, other = (specialisations(fn, arguments_of(fn, **dict.fromkeys(names, odd[i:]))) for i in (0, 1))
    assert one == other
    # Control: where queries begin would, and is therefore always a multiple of 16 bytes.
    assert specialisations(fn, arguments_of(fn, q_ptr=odd[1:])) != specialisations(
        fn, arguments_of(fn, q_ptr=odd)
    )


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda x: x, True), (lambda x: x[1:], True), (lambda x: x[:, :48], True),
        (lambda x: x.flatten()[1:4097].view(64, 64), False), (lambda x: x[:, 1:49], False),
        (lambda x: x.t(), False), (lambda x: x.flatten()[:6400].view(64, 100)[:, :48], False),
    ],
)  # fmt: skip
def test_arguments_are_aligned_or_copied(make: Any, kept: bool):
    x = make(torch.randn(128, 64).bfloat16())
    found = kernel.aligned(x)
    assert torch.equal(found, x)
    assert (found.data_ptr() == x.data_ptr()) == kept
    assert found.data_ptr() % 16 == 0
    assert found.stride(-1) == 1


def instructions(sources: Iterator[Any], target: devices.Device) -> list[set[str]]:
    return [set(MMA.findall(k.compile(target).asm["ptx"])) for k in sources]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200"])
def test_buckets_of_a_product_use_one_instruction(device: str):
    """Alone and among experts, of any number of rows: the same matrix instruction and no other."""
    pytest.importorskip("triton")
    from llm42c.codegen.triton.catalog import kernels

    target = devices.from_table(device)
    products = [k for k in kernels(target) if k.label.startswith(("linear/", "grouped_linear"))]
    assert len(products) == len(linear.buckets(target)) + 1
    found = instructions(iter(products), target)
    assert len(found[0]) == 1
    assert all(one == found[0] for one in found)


@pytest.mark.slow
def test_schedulers_and_layouts_of_attention_use_the_same_instructions():
    pytest.importorskip("triton")
    from llm42c.codegen.triton.catalog import attention_kernel

    specs = [llama(scheduler="tickets"), llama(), llama(layout="rows")]
    firsts = (dataclasses.replace(attention_kernel(s), variants=()) for s in specs)
    found = instructions(firsts, H200)
    assert found[0]
    assert all(one == found[0] for one in found)


@pytest.mark.slow
def test_keys_are_fetched_in_wide_loads():
    """Sixteen bytes at once from pages of sixteen keys, which lie scattered."""
    pytest.importorskip("triton")
    from llm42c.codegen.triton.catalog import attention_kernel

    ptx = attention_kernel(llama()).compile(H200).asm["ptx"]
    widths = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", ptx)
    assert set(widths) == {"0x10"}
    assert "ld.global.b16" not in ptx


def reduced_layout(ttgir: str) -> str:
    """The layout in which a row's sum is taken."""
    used = re.search(r'"tt\.reduce"\(%\S+\) .*?\(tensor<\S+ (#\w+)>\) -> f32', ttgir, re.S)
    assert used, ttgir
    return next(line.split("=", 1)[1] for line in ttgir.splitlines() if line.startswith(f"{used[1]} ="))


@pytest.mark.slow
def test_norms_of_one_row_length_add_in_one_layout():
    """Alone, with a residual, with or without a weight: one tree."""
    pytest.importorskip("triton")
    from llm42c.codegen.triton.catalog import Kernel

    def layout(size: int, **options: bool) -> str:
        spec = norm.NormSpec(size, "bfloat16", **options)
        made = Kernel(
            "", "norm", norm.emit(spec), "bfloat16", spec.warps, types={"eps": "fp32", "offset": "fp32"}
        )
        return reduced_layout(made.compile(H200).asm["ttgir"])

    found = {
        layout(4096, residual=r, weight=w, cast_first=c)
        for r in (False, True)
        for w, c in ((True, True), (False, False))
    }
    assert len(found) == 1
    assert layout(100) not in found  # control


@pytest.mark.slow
def test_forms_of_a_fused_norm_add_in_one_layout():
    """One shot, two shots, a divided residual: one tree."""
    pytest.importorskip("triton")
    from llm42c.codegen.triton.catalog import fused_kernels

    wanted = [f"all_reduce_norm/{form}" for form in ("one", "two", "shard")]
    made = [k for k in fused_kernels(H200, "bfloat16") if k.label in wanted]
    assert len(made) == 3
    assert len({reduced_layout(k.compile(H200).asm["ttgir"]) for k in made}) == 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Tensors of a CPU in the role of a GPU's; the last entry says whether a graph is being captured."""
    state = [False]
    monkeypatch.setattr(attention, "capturing", lambda device: state[-1])
    return state


def test_a_plan_made_outside_of_a_capture_is_not_used_inside(
    recorded: list[bool], monkeypatch: pytest.MonkeyPatch
):
    made: list[object] = []
    monkeypatch.setattr(attention, "make_plan", lambda *_: made.append(object()) or made[-1])
    lens, cu = torch.ones(2, dtype=torch.int32), torch.arange(3).int()
    with attention.step():
        outside = attention.plan_of(llama(), 2, cu, lens, 64)
        assert attention.plan_of(llama(), 2, cu, lens, 64) is outside
        recorded.append(True)
        inside = attention.plan_of(llama(), 2, cu, lens, 64)
        assert inside is not outside
        assert attention.plan_of(llama(), 2, cu, lens, 64) is inside
    assert attention.plan_of(llama(), 2, cu, lens, 64) is not inside


def test_a_captured_graph_has_counters_of_its_own(recorded: list[bool]):
    device = torch.device("cpu")
    outside = attention.counters_of(device)
    assert attention.counters_of(device) is outside
    recorded.append(True)
    with attention.step():
        inside = attention.counters_of(device)
        assert inside is not outside
        assert attention.counters_of(device) is inside
    assert attention.counters_of(device) is not inside


def test_partial_results_have_bounded_room():
    spec = llama()
    assert attention.slots_for(spec, 8, 4, 4096) == 4 * 8
    many = attention.slots_for(spec, 512, 512, 1 << 20)
    assert many * spec.kv_heads * spec.decode_rows * (spec.head_dim + 2) * 4 <= attention.WORKSPACE_BYTES
    assert many < 512 * ((1 << 20) // spec.split)  # the bound is one
