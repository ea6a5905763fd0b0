"""Best of n by exact log-probability: the ranking cannot depend on how the candidates were batched.

    python examples/hf_best_of_n.py [MODEL]

`logprobs` are those of the raw logits, the same bits in every run, so that ties and near-ties are settled
the same way each time.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import llm42c
from llm42c.hub.models import load_model

WAY = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.1, "seed": 5}


def best_of(model: Any, ids: torch.Tensor, n: int) -> tuple[float, list[int]]:
    """The candidate with the greatest mean log-probability, and its tokens. ids: [1, S]"""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_return_sequences=n,
        return_dict_in_generate=True,
        **WAY,
    )
    means = (out.logprobs.double().sum(-1) / out.lengths).tolist()  # zeros stand after a row's end
    best = max(range(n), key=lambda i: means[i])
    return means[best], out.sequences[best, ids.shape[1] :][: out.lengths[best]].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="a folder, a hub id, or 'smollm2'")
    model, tokenizer = load_model(parser.parse_args().model)
    llm42c.deterministic(model)
    ids = tokenizer("The recipe calls for a pinch of", return_tensors="pt")["input_ids"]

    score, tokens = best_of(model, ids, 8)
    print(f"best of 8 ({score:.6f}):", tokenizer.decode(tokens, skip_special_tokens=True))
    again, same_tokens = best_of(model, ids, 8)
    wider, _ = best_of(model, ids, 12)
    print("the same when asked again:", (again, same_tokens) == (score, tokens))
    print("never worse with more candidates:", wider >= score)
    if (again, same_tokens) != (score, tokens) or wider < score:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
