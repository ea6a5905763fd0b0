"""torch.compile with the llm42 backend: a prompt's bits do not depend on what shares its batch.

    python examples/quickstart.py [MODEL]

The backend is found by its name; only the loading of the packaged model needs an import of llm42's.
"""

from __future__ import annotations

import argparse

import torch

from llm42c.hub.models import load_model


def last_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits after each row of ids [B, S], as integers, so that equal means equal bits. [B, V]"""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -1].contiguous().view(torch.int16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="a folder, a hub id, or 'smollm2'")
    model, tokenizer = load_model(parser.parse_args().model, torch.bfloat16)
    prompt = torch.tensor(tokenizer("The lighthouse keeper had not spoken to")["input_ids"])  # [S]
    others = torch.randint(100, 1000, (6, len(prompt)), generator=torch.Generator().manual_seed(0))

    compiled = torch.compile(model, backend="llm42", dynamic=True)
    alone = last_logits(compiled, prompt[None])[0]
    for row in (0, 3, 6):
        batch = torch.cat([others[:row], prompt[None], others[row:]])  # [7, S]
        same = torch.equal(last_logits(compiled, batch)[row], alone)
        print(f"row {row} of a batch of {len(batch)}: {'the same bits' if same else 'OTHER BITS'}")
        if not same:
            raise SystemExit(1)
    print("next token:", repr(tokenizer.decode(alone.view(torch.bfloat16).argmax())))


if __name__ == "__main__":
    main()
