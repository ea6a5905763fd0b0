"""An evaluation that gives the same score for every batch size and order, down to the last bit.

    python examples/hf_evaluation.py [MODEL]

Each question is answered greedily, and scored by the exact log-probability of its answer. Stock generate
gives other bits, and now and then another answer, when the batch size changes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from typing import Any

import torch

import llm42c
from llm42c.hub.models import load_model

QUESTIONS = {
    "The capital of France is": "Paris",
    "The opposite of hot is": "cold",
    "Two plus two is": "four",
    "The first month of the year is": "January",
    "Water freezes at zero degrees": "Celsius",
    "The colour of a clear sky is": "blue",
    "A baby cat is called a": "kitten",
    "The largest planet is": "Jupiter",
}


def evaluate(model: Any, tokenizer: Any, questions: list[str], batch_size: int) -> tuple[int, str]:
    """Right answers, and a digest of every token and log-probability bit, by question."""
    right, records = 0, {}
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        for i, question in enumerate(batch):
            text = tokenizer.decode(new[i], skip_special_tokens=True)
            right += QUESTIONS[question].lower() in text.lower()
            length = int(out.lengths[i])  # padding follows
            bits = out.logprobs[i, :length].view(torch.int32)
            records[question] = (new[i, :length].tolist(), bits.tolist())
    return right, hashlib.sha256(repr(sorted(records.items())).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="a folder, a hub id, or 'smollm2'")
    model, tokenizer = load_model(parser.parse_args().model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    llm42c.deterministic(model)

    results = set()
    for batch_size in (1, 3, 8):
        questions = list(QUESTIONS)
        random.Random(batch_size).shuffle(questions)
        right, digest = evaluate(model, tokenizer, questions, batch_size)
        results.add((right, digest))
        print(f"batch size {batch_size}: {right} of {len(questions)} right, digest {digest}")
    if len(results) != 1:
        raise SystemExit("the evaluation is not reproducible")


if __name__ == "__main__":
    main()
