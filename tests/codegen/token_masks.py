"""Logits and masks to try ``llm42::apply_token_mask`` on; as a program, what its GPU kernel makes of them
(with TRITON_INTERPRET=1)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Vocabularies around words and blocks; NaN, infinities, words of all ones and of none."""
    g = torch.Generator().manual_seed(1)
    for rows, vocab in ((1, 1), (3, 31), (2, 32), (2, 33), (4, 1500), (0, 40)):
        logits = (torch.randn(rows, vocab, generator=g) * 9).to(dtype)
        mask = torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), generator=g).int()
        if vocab > 100:
            logits[0, ::7], logits[1, ::5], logits[2, ::3] = torch.nan, torch.inf, -0.0
            mask[0, 3:9], mask[1, 3:9] = 0, -1
        yield logits, mask


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, NaN included."""
    words = {4: torch.int32, 2: torch.int16}[x.element_size()]
    return x.dtype == y.dtype and torch.equal(x.contiguous().view(words), y.contiguous().view(words))


def main() -> None:
    from llm42c.codegen.ops.token_mask import apply_token_mask
    from llm42c.codegen.triton import token_mask

    found = [
        same(token_mask.apply_token_mask(logits, mask), apply_token_mask.reference(logits, mask))
        for dtype in DTYPES
        for logits, mask in cases(dtype)
    ]
    logits, mask = list(cases(torch.float32))[4]
    other = token_mask.apply_token_mask(logits, mask.flip(1))
    print(json.dumps({"same": found, "control": same(other, apply_token_mask.reference(logits, mask))}))


if __name__ == "__main__":
    main()
