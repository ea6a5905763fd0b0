"""Committed tokens of one or several prompts as an asynchronous iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from llm42c.errors import RequestError
from llm42c.runtime.hf import arguments as args
from llm42c.runtime.hf.generate import Call, make_rows
from llm42c.runtime.hf.rows import Run
from llm42c.runtime.pump import Pump


class StreamedToken(NamedTuple):
    """One committed token and its exact log-probability; `row` counts prompts, copies side by side."""

    token_id: int
    logprob: float
    row: int = 0


def prompts_of(inputs: Any, attention_mask: Tensor | None) -> Sequence[Any]:
    """Prompts without padding: of a list of ids, a list of such lists, or a tensor [n] or [B, W].

    Raises RequestError for a mask without a tensor [B, W], or an empty row.
    """
    if isinstance(inputs, Tensor) and inputs.dim() == 2:
        return args.rows_of(inputs, attention_mask, None)
    if attention_mask is not None:
        raise RequestError("attention_mask: only a tensor of prompts [B, W] has a mask")
    many = not isinstance(inputs, Tensor) and len(inputs) and isinstance(inputs[0], (Sequence, Tensor))
    many = many and not (isinstance(inputs[0], Tensor) and inputs[0].dim() == 0)
    return list(inputs) if many else [inputs]


async def stream(call: Call, prompts: list[list[int]], pump: Pump) -> AsyncIterator[StreamedToken]:
    """Tokens of all rows in the order in which they are committed. Leaving the iterator aborts the rest."""
    rows = make_rows(call, prompts)
    sent = [0] * len(rows)
    with Run(pump, rows, stream=True, together=False) as run:
        while run.active:
            for row in await asyncio.to_thread(run.advance):
                if row.error is not None:
                    raise row.error
                for i in range(sent[row.index], len(row.tokens)):
                    yield StreamedToken(row.tokens[i], row.logprobs[i], row.index)
                sent[row.index] = len(row.tokens)
