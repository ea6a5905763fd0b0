"""A model that changes after it was wrapped: the next generate says what the changed model says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import ENGINE, VOCAB, make, padded, prompt
from torch import nn

import llm42c
from llm42c.errors import UnsupportedModelError
from llm42c.runtime.hf.fingerprint import checksums

INPUTS = padded([prompt(5, 1), prompt(9, 2)])
Change = Callable[[Any], Any]


def _make() -> Any:
    return make("llama", tie_word_embeddings=False)


def _say(model: Any) -> torch.Tensor:
    said: torch.Tensor = model.generate(**INPUTS, max_new_tokens=8, do_sample=False)
    return said


def _assert_noticed(change: Change, prepare: Change = lambda m: m, **options: Any) -> None:
    """After the same change a wrapped model says what the ordinary one says, and that is another text."""
    plain = _make()
    before = _say(plain)
    change(plain)
    after = _say(plain)
    assert not torch.equal(before, after)  # else nothing could be noticed
    model = llm42c.deterministic(_make(), **ENGINE, **options)
    assert torch.equal(_say(model), before)
    prepare(model)
    change(model)
    assert torch.equal(_say(model), after)
    assert model.llm42.compilations == 2


# -- weights -------------------------------------------------------------------------------------------


def _negate_through_data(model: Any) -> None:
    """Moves no version counter."""
    model.lm_head.weight.data.mul_(-1)


@pytest.mark.parametrize("how", ["keep_weights", "unpack", "forward"])
def test_an_update_through_data_is_noticed(how: str) -> None:
    prepare: dict[str, Change] = {
        "keep_weights": lambda m: m,
        "unpack": lambda m: m.llm42.unpack(),
        "forward": lambda m: m(**INPUTS),
    }
    _assert_noticed(_negate_through_data, prepare[how], keep_weights=how == "keep_weights")


def test_the_embedding_is_noticed_though_it_is_never_packed() -> None:
    _assert_noticed(lambda m: m.model.embed_tokens.weight.data.neg_())


def test_writing_to_packed_weights_is_an_error() -> None:
    """Never a silent loss of the update."""
    model = llm42c.deterministic(_make(), **ENGINE)
    writes: list[Change] = [
        lambda w: w.mul_(2),
        lambda w: w.data.mul_(2),
        lambda w: w.copy_(torch.zeros(VOCAB, 64)),
        lambda w: w.add_(torch.ones(VOCAB, 64)),
        lambda w: nn.init.normal_(w),
    ]
    for write in writes:
        with torch.no_grad(), pytest.raises(RuntimeError, match="single memory location"):
            write(model.lm_head.weight)
    assert model.lm_head.weight.isnan().all()  # nor does reading give a number
    assert torch.equal(_say(model), _say(_make()))


@pytest.mark.parametrize("through_data", [False, True])
def test_one_value_for_all_elements_of_a_packed_weight(through_data: bool) -> None:
    def change(model: Any) -> None:
        weight = model.model.layers[1].mlp.down_proj.weight
        with torch.no_grad():
            (weight.data if through_data else weight).zero_()

    _assert_noticed(change)


def test_an_optimizer_step_after_the_weights_were_packed_again() -> None:
    def train(model: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        if hasattr(model, "llm42"):
            model.llm42.release()
            with pytest.raises(RuntimeError, match="single memory location"):
                optimizer.step()
            model.llm42.unpack()
        optimizer.step()

    plain, model = _make(), llm42c.deterministic(_make(), **ENGINE)
    before = _say(plain)
    train(plain)
    assert not torch.equal(_say(plain), before)
    norms = [n for n, _ in model.named_parameters() if "norm" in n or "embed" in n]
    with torch.no_grad():
        kept = {n: p.clone() for n, p in model.named_parameters() if n in norms}
    train(model)
    assert any(not torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)
    with llm42c.deterministic.off(model):
        expected = _say(model)
    assert torch.equal(_say(model), expected)
    assert not torch.equal(expected, before)


def test_part_of_a_model_is_converted() -> None:
    model = llm42c.deterministic(_make(), **ENGINE)
    model.lm_head.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, _make().lm_head.weight.bfloat16())
    with pytest.raises(UnsupportedModelError, match="bfloat16, float32"):
        _say(model)
    model.model.to(torch.bfloat16)
    expected = _make().to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert _say(model).shape == (2, 17)
    assert all("_apply" not in m.__dict__ for m in llm42c.deterministic.undo(model).modules())


def test_resized_embeddings() -> None:
    model = llm42c.deterministic(_make(), **ENGINE)
    model.llm42.unpack()
    model.resize_token_embeddings(VOCAB + 16, mean_resizing=False)
    assert torch.equal(model.lm_head.weight[:VOCAB], _make().lm_head.weight)
    assert _say(model).shape == (2, 17)
    assert model.llm42._pump.engine.limits.vocab_size == VOCAB + 16


def test_the_content_counts_by_value_and_place() -> None:
    for size in (1, 7, 8, 4097 * 8, 3 * 4096 * 8 + 13):
        memory = torch.arange(size).to(torch.uint8)
        same, other = checksums([memory]), memory.clone()
        assert checksums([other]) == same
        other[size // 2] ^= 1
        assert checksums([other]) != same
    pages = torch.randn(4, 4096 * 8)
    assert checksums([pages]) != checksums([pages[[1, 0, 2, 3]]])
    few = [torch.randn(3), torch.randn(3)]
    assert checksums(few) != checksums(few[::-1])
    assert checksums([pages[1:], pages]) == checksums([pages])


# -- modules -------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A linear with an adapter, as fine-tuning libraries put one in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=generator) * 0.3)
        self.b = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * 0.3)
        self.enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x)
        return out + (x @ self.a.t()) @ self.b.t() if self.enabled else out


def _adapt(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)


def test_adapters_come_and_are_switched_off() -> None:
    plain, model = _make(), llm42c.deterministic(_make(), **ENGINE)
    before = _say(plain)
    assert torch.equal(_say(model), before)
    for m in (plain, model):
        _adapt(m)
    adapted = _say(plain)
    assert not torch.equal(adapted, before)
    assert torch.equal(_say(model), adapted)
    for layer in model.model.layers:
        layer.self_attn.q_proj.enabled = False
    assert torch.equal(_say(model), before)


def test_hooks_come_and_go() -> None:
    def steer(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * -1.5

    plain, model = _make(), llm42c.deterministic(_make(), **ENGINE)
    before = _say(model)
    handles = [m.model.layers[0].mlp.register_forward_hook(steer) for m in (plain, model)]
    steered = _say(plain)
    assert not torch.equal(steered, before)
    assert torch.equal(_say(model), steered)
    handles[1].remove()
    assert torch.equal(_say(model), before)


def test_tied_after_wrapping() -> None:
    def tie(model: Any) -> None:
        model.lm_head.weight = model.model.embed_tokens.weight

    _assert_noticed(tie)


def test_what_changes_nothing_compiles_nothing() -> None:
    model = llm42c.deterministic(_make(), **ENGINE)
    _say(model)
    model.train()
    _say(model)
    model.eval()
    model(**INPUTS)
    _say(model)
    model.llm42.release()
    _say(model)
    model.requires_grad_(False)
    assert model.state_dict()
    _say(model)
    assert model.llm42.compilations == 1
