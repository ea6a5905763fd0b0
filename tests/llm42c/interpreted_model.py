"""A tiny Llama whose operators are the Triton kernels, under Triton's interpreter: one JSON object.

``TRITON_INTERPRET`` is read at import, so this is a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from llm42c.capture.packed import PackedInputs
from llm42c.codegen.ops.registry import implemented
from llm42c.codegen.triton import attention, packing
from llm42c.compile.compiler import CompiledModel, ModelCompiler

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
PACKED = {"linear": 3, "linear_add": 4, "linear_silu_mul": 2}  # place of the number of columns


def batch() -> PackedInputs:
    """A prefill of five tokens, a decode at position 0, and two rows of padding."""
    return PackedInputs(
        input_ids=torch.tensor([3, 1, 4, 1, 5, 9, 0, 0]),
        positions=torch.tensor([0, 1, 2, 3, 4, 0, 0, 0]),
        slot_mapping=torch.tensor([16, 17, 18, 19, 20, 0, -1, -1]),
        cu_seqlens_q=torch.tensor([0, 5, 6], dtype=torch.int32),
        kv_lens=torch.tensor([5, 1], dtype=torch.int32),
        block_table=torch.tensor([[1], [0]], dtype=torch.int32),
        logits_indices=torch.tensor([4, 5]),
    )


def on_triton(model: CompiledModel, called: set[str]) -> Callable[..., Any]:
    """The model's straight-line program with the kernels in place of the operators of the CPU."""

    def kernel(name: str) -> Callable[..., Any]:
        launch = implemented("cuda")[name]

        def call(*args: Any) -> Any:
            called.add(name)
            if name in PACKED:  # the CPU packs in another order
                columns = args[PACKED[name]] * (2 if name == "linear_silu_mul" else 1)
                plain = torch.ops.llm42.linear_unpack(args[1], columns, args[0].shape[-1])
                args = (args[0], packing.linear_pack(plain), *args[2:])
            return launch(*args)

        return call

    def replaced(name: str, value: Any) -> Any:
        operator = re.sub(r"_\d+$", "", name)
        return kernel(operator) if callable(value) and operator in implemented("cuda") else value

    run = model.program.run
    scope = {name: replaced(name, value) for name, value in run.__globals__.items()}
    return types.FunctionType(run.__code__, scope)


def main() -> None:
    torch.manual_seed(0)
    built = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()
    model = ModelCompiler(built, keep_originals=True).compile("pinned")
    want = model.forward(batch(), model.new_kv_cache(2, 16))
    called: set[str] = set()
    made: list[int] = []
    make_plan, default_spec = attention.make_plan, attention.default_spec

    def interpretable(*args: Any, **kwargs: Any) -> Any:
        """There is no register with the number of a multiprocessor."""
        return dataclasses.replace(default_spec(*args, **kwargs), sm="program", sms=2)

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return make_plan(*args, **kwargs)

    attention.make_plan, attention.default_spec = counted, interpretable
    model.program.run = on_triton(model, called)

    def forward() -> Tensor:
        made.clear()
        return model.forward(batch(), model.new_kv_cache(2, 16))

    with attention.step():
        got = forward()
    shared = len(made)
    forward()
    alone = len(made)
    for _ in range(2):
        with attention.step():
            model.forward(batch(), model.new_kv_cache(2, 16))
    # Sums of n products in another order differ by at most n eps of the sum of magnitudes; every logit is
    # behind some ten products in a row, of magnitudes around the largest logit.
    n = max(SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"])
    bound = 10 * 2 * n * torch.finfo(torch.float32).eps * float(want.abs().max())
    found = {
        "layers": SIZES["num_hidden_layers"],
        "plans in a step": shared,
        "plans without a step": alone,
        "plans of two steps": len(made) - alone,
        "error": float((got - want).abs().max()),
        "bound": bound,
        "operators": sorted(called),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
