"""``llm42::apply_token_mask``: logits of tokens that may not come become minus infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from llm42c.codegen.operator import operator
from llm42c.codegen.order import COPY


@operator(orders={"cpu": COPY, "cuda": COPY})
def apply_token_mask(logits: Tensor, mask: Tensor) -> Tensor:
    """Keep the logits whose bit is set.

    Args:
        logits: ``[R, V]``, float32, bfloat16 or float16.
        mask: ``[R, ceil(V / 32)]`` int32. Bit ``v % 32`` of word ``v // 32``, from the least significant one,
            is token ``v``'s; bits beyond V are not read.

    Returns:
        ``[R, V]`` of the logits' dtype: the logit's own bits, NaN included, or minus infinity.

    Raises:
        ValueError, TypeError: (the operator) a shape or dtype that does not fit.
    """
    token = torch.arange(logits.shape[1], device=logits.device)
    kept = mask[:, token // 32] >> (token % 32).int() & 1
    return logits.masked_fill(kept == 0, -torch.inf)


@apply_token_mask.fake
def _fake(logits: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
