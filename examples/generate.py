"""A Hugging Face model whose `generate` gives a prompt the same answer in every batch.

python examples/generate.py [MODEL]
"""

from __future__ import annotations

import argparse

import torch

import llm42c
from llm42c.hub.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="a folder, a hub id, or 'smollm2'")
    model, tokenizer = load_model(parser.parse_args().model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    llm42c.deterministic(model)

    texts = ["The tide comes in and", "A short list of fruit: apple,", "Once, in a town without clocks,"]
    way = {"max_new_tokens": 16, "do_sample": True, "temperature": 0.9, "seed": 3}
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, **way)[:, batch["input_ids"].shape[1] :]
    for text, row in zip(texts, together, strict=True):
        single = tokenizer(text, return_tensors="pt")
        alone = model.generate(**single, **way)[0, single["input_ids"].shape[1] :]
        same = torch.equal(alone, row[: len(alone)])
        print(f"{text}{tokenizer.decode(alone, skip_special_tokens=True)}")
        print("   alone and in the batch:", "the same" if same else "DIFFERENT")
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
