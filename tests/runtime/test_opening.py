"""The second start of a model: the engine is the same, and none of its model's code is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny_folder

HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "torch.distributed.tensor",
    "transformers.modeling_utils",
)
PROGRAM = f"""
import json, sys
from llm42c import SamplingParams
from llm42c.runtime.opening import open_model

built = open_model(sys.argv[1], kv_cache_bytes=1 << 20)
ids = built.tokenizer("w5 w7 w9")["input_ids"]
built.engine.submit(ids, SamplingParams(max_tokens=6, temperature=0.9, seed=3), deterministic=True)
outputs = []
while built.engine.has_unfinished():
    outputs += built.engine.step()
print(json.dumps({{
    "model": type(built.model).__name__,
    "tokens": [t for o in outputs for t in o.new_token_ids],
    "logprobs": [x.hex() for x in outputs[-1].logprobs],
    "text": outputs[-1].text,
    "contract": built.engine.contract.hash,
    "imported": [name for name in {HEAVY!r} if name in sys.modules],
}}))
"""


def start(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def test_the_second_start_imports_no_model(tmp_path: Path, own_cache: Path) -> None:
    folder = tiny_folder.save(tmp_path / "model")
    first, second = start(folder), start(folder)
    assert (first.pop("model"), second.pop("model")) == ("LlamaForCausalLM", "StandIn")
    assert (first.pop("imported"), second.pop("imported")) == (list(HEAVY), []), (
        "the first shows that names hold"
    )
    assert second == first
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'))
    third = start(folder)
    assert third["model"] == "LlamaForCausalLM"
    assert third["contract"] != first["contract"]
    assert third["logprobs"] != first["logprobs"]
