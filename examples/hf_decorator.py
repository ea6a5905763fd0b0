"""A function that loads a model, decorated: whoever calls it gets a deterministic one.

python examples/hf_decorator.py [MODEL]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import llm42c
from llm42c.hub import models


@llm42c.deterministic(max_num_seqs=4, kv_cache_bytes=64 * 2**20)
def load(name: str) -> Any:
    """An ordinary loader; a model class can be decorated in the same way."""
    return models.load_model(name)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="a folder, a hub id, or 'smollm2'")
    name = parser.parse_args().model
    model, tokenizer = load(name), models.load_tokenizer(name)

    inputs = tokenizer("Three rivers meet below the old bridge, and", return_tensors="pt")
    ours = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    with llm42c.deterministic.off(model):  # the ordinary model, for comparison
        plain = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    print(tokenizer.decode(ours[0], skip_special_tokens=True))
    print("stock generate says the same:", torch.equal(ours, plain))
    print("contract:", model.llm42.contract.hash[:16])


if __name__ == "__main__":
    main()
