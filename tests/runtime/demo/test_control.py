"""The demo's control: it counts what differs, and finds nothing where nothing does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf

from llm42c.runtime.demo import control

JOBS = [("a", [5, 6, 7]), ("b", [9]), ("c", list(range(3, 20)))]


class Stub:
    """Next token and its logits from the last token alone; `noise` is added when the batch has many rows."""

    device = torch.device("cpu")

    def __init__(self, noise: float, flips: bool = False) -> None:
        self.noise, self.flips = noise, flips

    def __call__(self, input_ids: torch.Tensor, **kw: Any) -> Any:
        last = input_ids[:, -1]
        logits = torch.nn.functional.one_hot((last * 7 + 1) % 50, 50).float()
        if len(last) > 1:
            logits[:, 0] += self.noise
            if self.flips:
                logits[:, 49] += 2.0
        return SimpleNamespace(logits=logits[:, None], past_key_values=None)


def test_equal_results_count_as_equal() -> None:
    found = control.run_control(Stub(0.0), JOBS, 4)
    assert (found.differ, found.logprobs_differ, found.max_difference) == ([], 0, 0.0)
    assert found.logprobs_compared == 4 * len(JOBS)


def test_small_noise_shows_in_log_probs_only() -> None:
    found = control.run_control(Stub(1e-3), JOBS, 4)
    assert found.differ == ["a", "b", "c"]
    assert found.tokens_differ == []
    assert found.logprobs_differ == found.logprobs_compared == 12
    assert found.max_difference > 0


def test_other_tokens_end_the_comparison() -> None:
    found = control.run_control(Stub(0.0, flips=True), JOBS, 4)
    assert found.tokens_differ == ["a", "b", "c"]
    assert found.logprobs_compared == 0


def test_it_decodes_as_generate_does() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=60, max_position_embeddings=64)
    model = hf.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    for _, ids in JOBS:
        ((tokens, _),) = control._decode(model, [ids], 6, model.device)
        expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert tokens.tolist() == expected[0, len(ids) :].tolist()
    batch = control._decode(model, [ids for _, ids in JOBS], 6, model.device)
    assert [len(tokens) for tokens, _ in batch] == [6, 6, 6]
