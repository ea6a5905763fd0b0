"""JSON of SmolLM2: valid under its schema, and the same bits alone, together, and with drafts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from llm42c.runtime.loader import build_engine
from llm42c.runtime.sampling import SamplingParams

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "born": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "born", "alive"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
PROMPTS = ("Ada Lovelace as JSON:", "A person, please.", "def f(x):\n", "1, 2, 3,")


def is_valid(text: str) -> bool:
    value: Any = json.loads(text)
    born = value["born"]
    kinds = [type(v) for v in value.values()]
    return list(value) == list(SCHEMA["properties"]) and kinds == [str, int, bool] and 1000 <= born <= 2100  # type: ignore[call-overload]


@pytest.mark.model
@pytest.mark.slow
def test_json_is_valid_and_its_bits_depend_on_nothing_else() -> None:
    built = build_engine("smollm2", persist_certificates=False, num_pages=128)
    params = [
        SamplingParams(max_tokens=48, json_schema=SCHEMA),
        SamplingParams(max_tokens=48, json_schema=SCHEMA, temperature=1.0, seed=5),
        SamplingParams(max_tokens=48, choice=("red", "blue", "the colour of “Ärger”\n")),
    ]
    prompts = [built.tokenizer(text).input_ids for text in PROMPTS for _ in params]
    chosen = params * len(PROMPTS)
    alone = [built.engine.generate([p], q)[0] for p, q in zip(prompts, chosen, strict=True)]
    for output, asked in zip(alone, chosen, strict=True):
        assert output.finish_reason == "stop", output
        assert output.text in asked.choice if asked.choice else is_valid(output.text)
    (free,) = built.engine.generate([prompts[0]], dataclasses.replace(params[0], json_schema=None))
    assert not free.text.startswith('{"name"'), "vacuous"
    together = built.variant(verify="always", speculate="ngram").generate(prompts, chosen)
    for one, other in zip(alone, together, strict=True):
        assert (one.token_ids, one.logprobs, one.text) == (other.token_ids, other.logprobs, other.text)
