"""Decoders that attend, count positions or hold keys in their own way, through `generate`: the survey's cell.

Each is the survey's tiny model. Its cell must be *ok*, and must not be if the mechanism behind it is taken
away.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llm42c
from llm42c.capture import hf_interface
from llm42c.errors import IntegrityError, UnsupportedModelError
from llm42c.runtime.survey import cells
from llm42c.runtime.survey.classes import decoders
from llm42c.runtime.survey.tiny import tiny_fields, tiny_model

BY_NAME = {decoder.name: decoder for decoder in decoders()}
SERVED = {
    "heads of another size in some layers": "Gemma4ForCausalLM",
    "two attentions a layer": "DiffLlamaForCausalLM",
    "layers that are run again": "HrmTextForCausalLM",
    "a mask of ones that multiplies scores": "OpenAIGPTLMHeadModel",
    "writes to parts of hidden states": "Gemma3nForCausalLM",
    "experts' rows added at an index": "JetMoeForCausalLM",
    "complex rotary positions": "DeepseekV2ForCausalLM",
    "positions that generate counts from 0, and forward from another number": "RobertaForCausalLM",
}
REFUSED = {
    "CTRLLMHeadModel": "self.pos_encoding",  # Dynamo does not take the assignment of a buffer
    "DogeForCausalLM": "masked_fill",  # a mask that is computed from the tokens
    "LongcatFlashForCausalLM": "expert_hit",  # a loop over the experts that are used
    "MambaForCausalLM": "recurrent state",
    "Llama4ForCausalLM": "chunked_attention",
}


def _tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model_class, config_class = BY_NAME[name].load()
    return tiny_model(model_class, config_class, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED.values(), ids=SERVED)
def test_what_each_construct_needs(name: str) -> None:
    cells.check_generate(_tiny(name), _tiny(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiffLlamaForCausalLM", "JetMoeForCausalLM"])
def test_in_half_precision(name: str) -> None:
    cells.check_generate(_tiny(name, torch.bfloat16), _tiny(name))


@pytest.mark.parametrize(("name", "construct"), REFUSED.items())
def test_refusals_name_the_construct_and_the_page(name: str, construct: str) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        llm42c.deterministic(_tiny(name), **cells.ENGINE)
    (line,) = str(refusal.value).splitlines()
    assert line.startswith(f"{name} is not supported: ")
    assert construct in line
    assert line.endswith("; see docs/huggingface.md#which-decoders-are-served")


def test_an_encoder_is_told_from_a_decoder() -> None:
    """The same class and weights: its configuration alone makes it one or the other."""
    model_class, config_class = BY_NAME["CamembertForCausalLM"].load()
    model = model_class(config_class(**tiny_fields(config_class) | {"is_decoder": False}))
    with pytest.raises(UnsupportedModelError, match=r"neither causal nor .*is_decoder=False"):
        llm42c.deterministic(model, **cells.ENGINE)


def test_positions_that_are_offered_and_not_taken() -> None:
    """A model that has a place for positions and counts for itself: counts become positions."""
    model = _tiny("LlamaForCausalLM")
    forward = model.model.forward

    def counting(input_ids: torch.Tensor, position_ids: Any = None, **keywords: Any) -> Any:
        counted = torch.arange(input_ids.shape[1])[None]
        return forward(input_ids=input_ids, position_ids=counted, **keywords)

    model.model.forward = counting
    prompt = cells.tokens(model, 1, 9)
    wanted = _logprobs(llm42c.deterministic(_tiny("LlamaForCausalLM"), **cells.ENGINE), prompt)
    assert torch.equal(_logprobs(llm42c.deterministic(model, **cells.ENGINE), prompt), wanted)


def test_what_a_forward_remembers_is_refused() -> None:
    """A tensor on the model that one call writes and the next reads would be another request's."""
    model = _tiny("LlamaForCausalLM")
    forward = model.model.forward

    def remembering(input_ids: torch.Tensor, **keywords: Any) -> Any:
        out = forward(input_ids=input_ids, **keywords)
        model.last_hidden = out.last_hidden_state * 2
        return out

    model.model.forward = remembering
    with pytest.raises(UnsupportedModelError, match="keeps tensors on the model besides its logits"):
        llm42c.deterministic(model, **cells.ENGINE)


def _logprobs(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    return out.logprobs  # type: ignore[no-any-return]


def test_calls_that_share_a_cache_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one cache for both attentions of a layer, as if each layer had one."""
    made = hf_interface.attention_function

    def by_layer(batch: Any) -> Any:
        function = made(batch)

        def attention(module: Any, *args: Any, **keywords: Any) -> Any:
            del batch["calls"][:]
            batch["calls"] += [0] * module.layer_idx
            return function(module, *args, **keywords)

        return attention

    monkeypatch.setattr(hf_interface, "attention_function", by_layer)
    model = _tiny("HrmTextForCausalLM")
    with pytest.raises(IntegrityError, match="not row independent"):
        cells.check_generate(model, model)


def test_what_generate_computes_is_not_what_forward_computes() -> None:
    """The guard: positions matter to this model, and eager's own generate counts them from 0."""
    model = _tiny("RobertaForCausalLM")
    ids = cells.tokens(model, 1, 9)
    with torch.no_grad():
        counted = model(ids, position_ids=torch.arange(9)[None]).logits
    own = cells.logits(model, ids)
    assert not torch.allclose(counted, own, atol=0.01)
