"""One version of a rule is one set of bits: what the sampler gives does not change under it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sampling_bits
import torch
from torch import Tensor

from llm42c.runtime import processors, sampling
from llm42c.runtime.contract import RULES
from llm42c.runtime.sampling import SamplingParams, operator_sampler

GOLDEN = Path(__file__).parent / "golden" / "sampling.json"


def golden() -> dict[str, str]:
    found: dict[str, str] = json.loads(GOLDEN.read_text())
    return found


def test_every_rule_of_the_contract_has_golden_bits() -> None:
    assert set(golden()) == {f"{rule}: {version}" for rule, version in RULES.items()}


@pytest.mark.parametrize("rule", RULES)
def test_bits_of_a_version_never_change(rule: str) -> None:
    """If this fails, the same request gets other tokens: raise the rule's version in
    ``runtime/contract.py``, then write the file anew with

    ``python tests/runtime/sampling_bits.py > tests/runtime/golden/sampling.json``.
    """
    assert sampling_bits.digest(rule) == golden()[f"{rule}: {RULES[rule]}"]


class Changed:
    """The operators with one thing changed: ``sample``'s arguments, or all log-probs."""

    def __init__(self, arguments: Callable[[list[Any]], None], logprobs: bool = False) -> None:
        self._arguments, self._logprobs = arguments, logprobs

    def sample(self, *args: Any) -> tuple[Tensor, Tensor]:
        changed = list(args)
        self._arguments(changed)
        tokens, logprobs = operator_sampler().sample(*changed)
        return tokens, self._next(logprobs)

    def token_logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return self._next(operator_sampler().token_logprobs(logits, tokens))

    def top_logprobs(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return operator_sampler().top_logprobs(logits, k)

    def _next(self, logprobs: Tensor) -> Tensor:
        return torch.nextafter(logprobs, torch.tensor(1.0)) if self._logprobs else logprobs


def _set(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Any]], None]:
    def apply(args: list[Any]) -> None:
        args[index] = change(args[index])

    return apply


SAMPLERS = {
    "the next position": ("noise", Changed(_set(6, lambda position: position + 1))),
    "the next seed": ("noise", Changed(_set(5, lambda seed: seed ^ 1))),
    "a higher temperature": ("choice", Changed(_set(1, lambda t: t * 1.05))),
    "ties by the highest index": ("choice", Changed(_set(0, lambda x: x + torch.arange(x.shape[1]) * 1e-6))),
    "one token more": ("filters", Changed(_set(2, lambda k: torch.where(k > 0, k + 1, k)))),
    "top-p left out": ("filters", Changed(_set(3, torch.ones_like))),
    "min-p left out": ("filters", Changed(_set(4, torch.zeros_like))),
    "the last bit of log-probs": ("logprobs", Changed(lambda args: None, logprobs=True)),
}


@pytest.mark.parametrize("change", SAMPLERS)
def test_a_change_of_the_sampler_is_noticed(change: str) -> None:
    rule, sampler = SAMPLERS[change]
    assert sampling_bits.digest(rule, Changed(lambda args: None)) == sampling_bits.digest(rule)
    assert sampling_bits.digest(rule, sampler) != golden()[f"{rule}: {RULES[rule]}"]


def _all_divided(row: Any, history: Any, penalty: float) -> None:
    row[history.ids] /= penalty


def _counted_once(row: Any, output: Any, frequency: float, presence: float) -> None:
    row[output.ids] -= frequency + presence


def _bias_last(request: Any, row: Tensor, length: int) -> None:
    """`process_row` with the user's processors before the bias."""
    params = request.params
    request.params = dataclasses.replace(params, logit_bias=None)
    processors.process_row(request, row, length)
    request.params = params
    for token, value in (params.logit_bias or {}).items():
        row[token] += value


@pytest.mark.parametrize(
    ("rule", "where", "name", "change"),
    [
        ("processing", processors, "apply_repetition_penalty", _all_divided),
        ("processing", processors, "apply_count_penalties", _counted_once),
        ("processing", sampling, "process_row", _bias_last),
        ("seed", SamplingParams, "derived_seed", lambda self, prompt: sum(prompt)),
    ],
)
def test_a_change_of_the_processing_is_noticed(
    rule: str, where: Any, name: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, change)
    assert sampling_bits.digest(rule) != golden()[f"{rule}: {RULES[rule]}"]
