"""Families of models in depth: one graph, eager's tokens, logits within a derived bound, and determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    ENGINE,
    FAMILIES,
    assert_like_eager,
    assert_rows,
    make,
    padded,
    plain,
    prompt,
    solo,
    wrapped,
)

import llm42c

PROMPTS = [prompt(5, 1), prompt(20, 2), prompt(37, 3)]
HALVES = [
    *((family, torch.bfloat16) for family in FAMILIES),
    *((family, torch.float16) for family in ("llama", "gemma3", "gpt2", "gpt_oss")),
]


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_and_eager_tokens(family: str) -> None:
    inputs, arguments = padded(PROMPTS), {"max_new_tokens": 64, "eos_token_id": None, "pad_token_id": 0}
    ours = wrapped(family).generate(**inputs, **arguments, do_sample=False)
    assert_like_eager(ours, plain(family), inputs, arguments)
    # Untrained models fall into loops; without repeats they keep talking.
    arguments["no_repeat_ngram_size"] = 2
    ours = wrapped(family).generate(**inputs, **arguments, do_sample=False)
    assert_like_eager(ours, plain(family), inputs, arguments)
    assert len(set(ours[:, 37:].reshape(-1).tolist())) > 20
    compiler = wrapped(family).llm42._built.compiler
    assert wrapped(family).llm42.compilations == 1
    assert len(compiler.kv_spec) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_within_their_bound(family: str) -> None:
    """|y - y*| to first order, y* in fp64: every weight perturbed by as much as rounding can amount to.

    A chain of n fused multiply-adds is the exact product for weights that differ by at most n·eps each; n is
    the longest sum here (96 products, or 101 positions). Twice that covers roundings in between.
    """
    inputs, steps = padded(PROMPTS[2:]), 64
    arguments: dict[str, Any] = {"max_new_tokens": steps, "eos_token_id": None, "pad_token_id": 0}
    out = wrapped(family).generate(
        **inputs, **arguments, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    exact_model: Any = make(family).double()
    exact_model.config._experts_implementation = "eager"  # the grouped product has no fp64
    exact = exact_model(out.sequences).logits[0, 36:-1]  # [steps, V]
    found = torch.cat(out.logits).double()
    n_eps = 2 * 101 * torch.finfo(torch.float32).eps
    for step in (0, 20, 63):
        place = int((found[step] - exact[step]).abs().argmax())
        exact_model.zero_grad()
        exact[step, place].backward(retain_graph=True)
        size = sum((p.grad * p).abs().sum().item() for p in exact_model.parameters() if p.grad is not None)
        error = (found[step, place] - exact[step, place]).abs().item()
        assert 0 < error <= n_eps * size


def _check_rows(model: Any, steps: int) -> None:
    """Alone, together on either side of the padding, in another order, and with strangers."""
    greedy: dict[str, Any] = {
        "max_new_tokens": steps,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    sampled = greedy | {"do_sample": True, "seed": 17, "top_p": 0.95}
    for arguments in (greedy, sampled):
        expected = solo(model, PROMPTS, **arguments)
        for order, side in (([0, 1, 2], "left"), ([2, 0, 1], "right")):
            rows = [PROMPTS[i] for i in order] + [prompt(11, 9)]
            out = model.generate(**padded(rows, side), **arguments, return_dict_in_generate=True)
            wanted = [expected[i] for i in order] + solo(model, rows[3:], **arguments)
            assert_rows(out, 37, wanted)
    assert model.llm42.stats().revocations == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_deterministic(family: str) -> None:
    _check_rows(wrapped(family), 24)


@pytest.mark.parametrize(("family", "dtype"), HALVES, ids=lambda v: str(v).removeprefix("torch."))
def test_rows_are_deterministic_in_half_precision(family: str, dtype: torch.dtype) -> None:
    model = wrapped(family, dtype)
    _check_rows(model, 8)
    llm42c.deterministic.undo(model)


def test_hf_eager_is_not_deterministic_here() -> None:
    """The control: stock generate gives other bits when the batch changes."""
    arguments: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    together = plain().generate(**padded(PROMPTS), **arguments)
    alone = plain().generate(**padded(PROMPTS[:1]), **arguments)
    changed = sum(not torch.equal(a[0], b[0]) for a, b in zip(together.logits, alone.logits, strict=True))
    assert changed > 0


def test_preemption_changes_nothing() -> None:
    """A KV budget of one long request, so that a batch is preempted again and again."""
    model = llm42c.deterministic(make("gemma3"), **(ENGINE | {"num_pages": 8}))
    expected = solo(wrapped("gemma3"), PROMPTS, max_new_tokens=40, do_sample=False, eos_token_id=None)
    out = model.generate(
        **padded(PROMPTS),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert_rows(out, 37, expected)
    assert model.llm42.stats().preemptions > 0


def test_experts_shared_by_other_tokens() -> None:
    """With two experts every token shares its expert with strangers."""
    model = llm42c.deterministic(make("mixtral", num_local_experts=2, num_experts_per_tok=1), **ENGINE)
    _check_rows(model, 8)
