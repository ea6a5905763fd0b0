"""Golden texts of emitted kernels: what a change of an emitter changes can be read in its diff."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llm42c.codegen.triton import (
    attention_combine,
    attention_plan,
    dense_attention,
    devices,
    grouped_linear,
    linear,
    pod_attention,
    reduce,
    running,
    sample,
)
from llm42c.codegen.triton.spec import AttentionSpec, default_spec

GOLDEN = Path(__file__).parent / "golden"
H200 = devices.from_table("NVIDIA H200")


def attention(**changes: str) -> AttentionSpec:
    """Llama-3-8B's heads."""
    return default_spec(
        H200, heads=32, kv_heads=8, head_dim=128, page=16, dtype="bfloat16", **changes  # type: ignore[arg-type]
    )  # fmt: skip


def dense(causal: bool, mask: str) -> dense_attention.DenseSpec:
    return dense_attention.spec_for(H200, 4, 128, "bfloat16", causal, False, False, mask)


SOURCES: dict[str, Callable[[], str]] = {
    "pod_attention_sm90_bf16.py": lambda: pod_attention.emit(attention()),
    "pod_attention_rows_sm90_bf16.py": lambda: pod_attention.emit(attention(layout="rows")),
    "attention_plan_sm90_bf16.py": lambda: attention_plan.emit(attention()),
    "attention_combine_sm90_bf16.py": lambda: attention_combine.emit(attention()),
    "dense_attention_sm90_bf16.py": lambda: dense_attention.emit(dense(True, "")),
    "linear_sm90_bf16_m64.py": lambda: linear.emit(linear.spec_for(H200, 1, "bfloat16", True, False)),
    "grouped_linear_sm90_bf16_m64.py": lambda: grouped_linear.emit(
        linear.spec_for(H200, 1, "bfloat16", False, True)
    ),
    "row_sum.py": lambda: reduce.emit("row_sum", 4096),
    "row_softmax.py": lambda: reduce.emit("row_softmax", 4096),
    "row_log_softmax.py": lambda: reduce.emit("row_log_softmax", 4096),
    "running_sum.py": lambda: running.emit("running_sum"),
    "running_product.py": lambda: running.emit("running_product"),
    "token_logprobs.py": sample.emit_logprobs,
}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_golden(name: str):
    """Regenerate with ``LLM42_WRITE_GOLDEN=1 pytest tests/codegen/test_triton_golden.py``."""
    path, text = GOLDEN / name, SOURCES[name]()
    if os.environ.get("LLM42_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text
    assert max(map(len, text.splitlines())) <= 110


def test_every_golden_text_is_looked_at():
    assert {path.name for path in GOLDEN.glob("*.py")} == SOURCES.keys()
