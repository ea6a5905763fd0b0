"""Mixtures of experts under torch.compile(backend="llm42"): rows do not know who shares their experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

LENGTH, ROWS = 11, 4
_SIZES = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 96,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "mixtral": lambda: hf.MixtralConfig(**_SIZES, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_SIZES, num_experts=4),
    "gpt_oss": lambda: hf.GptOssConfig(**_SIZES, num_local_experts=4, sliding_window=8),
}


def _model(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    built = hf.AutoModelForCausalLM.from_config(FAMILIES[family](), **settings).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape))
    return built.to(dtype)


def _ids(*shape: int) -> Tensor:
    return torch.randint(3, 101, shape, generator=torch.Generator().manual_seed(0))


def _changed(run: Any, ids: Tensor) -> int:
    """Rows that change their bits with the size of the batch or their place in it."""
    whole = run(ids)
    parts = ([2], [3, 1], [1, 0, 2])
    return sum(
        not torch.equal(row.view(torch.uint8), whole[i].view(torch.uint8))
        for part in parts
        for i, row in zip(part, run(ids[part]), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_mixture(family: str, dtype: torch.dtype) -> None:
    built, ids = _model(family, dtype), _ids(ROWS, LENGTH)
    torch._dynamo.reset()
    compiled = torch.compile(built, backend="llm42", dynamic=True, options={"strict": True})
    with torch.no_grad():
        logits = compiled(input_ids=ids).logits
        assert _changed(lambda rows: compiled(input_ids=rows).logits, ids) == 0
        eager = built(input_ids=ids).logits
        exact = _model(family, dtype, experts_implementation="eager").double()(input_ids=ids).logits
    assert (logits - exact).abs().max() <= 2 * (eager - exact).abs().max() + 2.0**-22


@pytest.mark.slow
def test_free_reductions_show_who_shares_an_expert() -> None:
    """The control."""
    built, ids = _model("mixtral"), _ids(ROWS, LENGTH)
    torch._dynamo.reset()
    compiled = torch.compile(built, backend="llm42", dynamic=True, options={"reductions": "free"})
    with torch.no_grad():
        assert _changed(lambda rows: compiled(input_ids=rows).logits, ids) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_of_a_mixture(family: str) -> None:
    ids = _ids(2, LENGTH)

    def gradients(built: Any, run: Any) -> dict[str, Tensor]:
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.double() for n, p in built.named_parameters()}

    ours, eager = _model(family), _model(family)
    exact = _model(family, experts_implementation="eager").double()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="llm42", dynamic=True)
    got, plain, true = gradients(ours, compiled), gradients(eager, eager), gradients(exact, exact)
    for name, gradient in true.items():
        error = (plain[name] - gradient).abs().max() + 2.0**-23 * gradient.abs().max()
        assert (got[name] - gradient).abs().max() <= 4 * error, name
