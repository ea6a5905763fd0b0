"""Run as a program: load a model in one way, and print the peak of this process's memory as JSON.

python load_peak.py WAY FOLDER, where WAY is one of

    folder      the loader reads the folder (mapped files)
    object      `llm42c.deterministic` takes a model whose weights lie in ordinary memory
    keep        the same, with the originals kept beside the packed weights
    ranks       as `folder`, under torchrun, the model divided among the ranks
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import llm42c
from llm42c.digest import weights_digest
from llm42c.memory import forget
from llm42c.parallel import ranks
from llm42c.runtime.loader import BuiltEngine, build_engine


def save(folder: Path, layers: int, **sizes: int) -> int:
    """A random bf16 Llama; returns the bytes of its weights."""
    config = hf.LlamaConfig(num_hidden_layers=layers, vocab_size=512, max_position_embeddings=256, **sizes)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def peak() -> int:
    """Bytes of the most memory that this process has held (VmHWM: since its program began)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _from_folder(folder: str, **options: Any) -> BuiltEngine:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return build_engine(model, kv_cache_bytes=1 << 22, persist_certificates=False, **options)


def _object(folder: str, **options: Any) -> BuiltEngine:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for parameter in model.parameters():
        mapped, parameter.data = parameter.data, parameter.data.clone()
        forget(mapped)
    llm42c.deterministic(model, kv_cache_bytes=1 << 22, persist_certificates=False, **options)
    built: BuiltEngine = model.llm42._built
    return built


def main(way: str, folder: str) -> None:
    if way == "ranks":
        with ranks.joined() as place:
            built = _from_folder(folder, ranks=place)
            print(json.dumps({"peak": peak(), "rank": place.rank}), flush=True)
            return
    built = _from_folder(folder) if way == "folder" else _object(folder, keep_weights=way == "keep")
    released = sum(map(built.compiler.weights.is_released, built.model.parameters()))
    found = {"peak": peak(), "released": released}
    built.close()
    found["exact"] = weights_digest(built.model) == built.compiler.digest
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
