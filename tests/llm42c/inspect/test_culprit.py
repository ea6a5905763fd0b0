"""The call behind a shape that is not certified is found by name."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm42c.compile.compiler import ModelCompiler
from llm42c.inspect.culprit import find_culprit


@pytest.fixture(scope="module")
def compiler() -> ModelCompiler:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
    )
    return ModelCompiler(LlamaForCausalLM(config).eval(), keep_originals=True)


@pytest.mark.parametrize(("tokens", "larger"), [(1, 2), (1, 64), (3, 8), (7, 64)])
def test_pinned_form_has_no_culprit(compiler: ModelCompiler, tokens: int, larger: int) -> None:
    assert find_culprit(compiler.compile("pinned"), tokens, larger) is None


def test_a_call_that_depends_on_the_batch_is_named(compiler: ModelCompiler) -> None:
    model = compiler.compile("pinned")
    original = model.program.run
    scope = dict(original.__globals__)
    norm = scope["add_rms_norm"]

    def depends_on_batch(x: torch.Tensor, *args: object) -> object:
        normed, residual = norm(x, *args)
        return normed * (1 + 2**-20 * x.numel()), residual

    scope["add_rms_norm"] = depends_on_batch
    model.program.run = type(original)(original.__code__, scope)
    try:
        culprit = find_culprit(model, 3, 8)
    finally:
        model.program.run = original
    assert culprit is not None
    assert culprit.name == "add_rms_norm"
    assert culprit.rows == culprit.compared == 3
    assert "add_rms_norm" in str(culprit)


def test_the_larger_batch_must_be_larger(compiler: ModelCompiler) -> None:
    with pytest.raises(ValueError, match="more tokens"):
        find_culprit(compiler.compile("pinned"), 8, 8)
