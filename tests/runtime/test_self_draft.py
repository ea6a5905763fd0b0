"""The engine's own model in quantised weights as a drafter, and another model: real graphs, same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from toy import Flat

from llm42c import quantised
from llm42c.errors import ConfigError, RequestError
from llm42c.hub.quantise import quantised_copy
from llm42c.runtime.drafters import DraftModel
from llm42c.runtime.engine import Engine
from llm42c.runtime.loader import BuiltEngine, build_engine
from llm42c.runtime.sampling import SamplingParams

LIMITS: dict[str, Any] = {
    "num_pages": 40, "max_num_seqs": 4, "max_num_batched_tokens": 32, "persist_certificates": False,
}  # fmt: skip
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [7, 8, 9], list(range(2, 60)))
PARAMS = (
    SamplingParams(max_tokens=20, ignore_eos=True),
    SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8, seed=5),
)


def tiny(vocab_size: int = 101) -> Any:
    """With an embedding that is scaled and tied, windows, and buffers that no checkpoint holds."""
    torch.manual_seed(0)
    config = hf.Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=vocab_size, max_position_embeddings=128,
        sliding_window=16,
    )  # fmt: skip
    return hf.Gemma3ForCausalLM(config).bfloat16().eval()


@pytest.fixture(scope="module")
def built() -> BuiltEngine:
    return build_engine(tiny(), **LIMITS)


def say(engine: Engine, speculate: Any) -> list[tuple[list[int], list[float]]]:
    engine._speculator.times = Flat()
    ids = [engine.submit(p, q, stream=False, speculate=speculate) for p in PROMPTS for q in PARAMS]
    done = {}
    while engine.has_unfinished():
        done |= {o.request_id: (o.token_ids, o.logprobs) for o in engine.step() if o.finished}
    return [done[i] for i in ids]


@pytest.mark.parametrize("speculate", ["self", "auto:self:q8_0"])
def test_drafts_of_the_model_s_own_weights_change_no_bit(built: BuiltEngine, speculate: str) -> None:
    """Built from a model whose weights the engine holds packed."""
    engine = built.variant(verify="auto")
    engine.certify()
    plain = say(engine, None)
    assert say(engine, speculate) == plain
    stats = engine.stats()
    assert 0 < stats.accepted_drafts <= stats.drafted_tokens
    assert stats.accepted_drafts > stats.drafted_tokens / 2
    whole = sum(p.numel() for p in built.model.parameters()) * 2
    assert 0 < stats.draft_weight_bytes < 0.8 * whole
    assert stats.draft_kv_bytes == 0


def test_a_smaller_model_drafts(built: BuiltEngine, tmp_path: Path) -> None:
    other = tiny()
    other.save_pretrained(tmp_path)
    engine = built.variant(speculate=f"model:{tmp_path}")
    engine.certify()
    assert engine.stats().draft_kv_bytes > 0
    plain = say(engine, None)
    assert say(engine, "engine") == plain
    assert engine.stats().accepted_drafts > engine.stats().drafted_tokens * 0.9, "the very same weights"


def test_a_copy_shares_nothing_and_says_what_its_weights_say() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made: Any = quantised_copy(model, "q8_0", lambda parameter: parameter.detach())
    assert quantised.formats(made) == {"q8_0": 15}
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (made, model))
    assert not mine & theirs
    ids = torch.tensor([[3, 4, 50, 9, 77]])
    with torch.no_grad():
        ours, expected = made(ids).logits.float(), model(ids).logits.float()
    assert 0 < (ours - expected).abs().max() < 0.05 * expected.abs().max()
    for parameter in made.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data.fill_(torch.nan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_draft_is_refused(built: BuiltEngine, tmp_path: Path) -> None:
    engine = built.variant(verify="auto")
    other = tiny(vocab_size=102)
    for spec, why in (
        (DraftModel(other), "its vocabulary has 102 tokens, the model's 101"),
        (DraftModel(built.model), "quantise"),
        (f"model:{tmp_path / 'nowhere'}", "nowhere"),
        (DraftModel(3), "a folder"),
    ):
        with pytest.raises(RequestError, match=why) as refused:
            engine.submit([1, 2], speculate=spec)
        assert "\n" not in str(refused.value)
    assert not engine.has_unfinished()
    with pytest.raises(ConfigError, match="vocabulary"):
        built.variant(speculate=DraftModel(other))
