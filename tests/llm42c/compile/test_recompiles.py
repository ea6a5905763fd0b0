"""Past its recompile limit Dynamo turns to eager code in silence: an error here; dynamic=True avoids it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch

from llm42c.errors import RecompileLimitError


@pytest.fixture
def limit_of_4() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=4):  # torch 2.11 has no torch.compile(recompile_limit=)
        yield


def _static(**options: Any) -> Any:
    """A function with a graph for every size."""
    torch._dynamo.reset()
    return torch.compile(
        lambda x: torch.softmax(x, -1), backend="llm42", dynamic=False, options=options or None
    )


@pytest.mark.usefixtures("limit_of_4")
def test_the_last_graph_is_refused() -> None:
    compiled = _static()
    for rows in (2, 3, 4):
        compiled(torch.ones(rows, 7))
    with pytest.raises(Exception, match=r"limit of 4 graphs .* dynamic=True") as caught:
        compiled(torch.ones(5, 7))
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, RecompileLimitError)
    compiled(torch.ones(3, 7))  # what was compiled goes on


@pytest.mark.usefixtures("limit_of_4")
def test_without_the_promise_there_is_no_limit() -> None:
    """The control: this is where Dynamo turns to eager code without an error."""
    compiled = _static(reductions="free")
    for rows in range(2, 9):
        compiled(torch.ones(rows, 7))


@pytest.mark.usefixtures("limit_of_4")
def test_each_function_has_its_own_limit() -> None:
    compiled, other = _static(), torch.compile(lambda x: x + 1, backend="llm42", dynamic=False)
    for rows in (2, 3, 4):
        compiled(torch.ones(rows, 7))
    other(torch.ones(5))


@pytest.mark.slow
def test_stock_generate_at_many_sizes() -> None:
    """Prefill and decode, a batch of one and larger ones, caches in both layouts: below the limit."""
    torch._dynamo.reset()
    model = tiny.model("llama", torch.float32, layers=1)
    model.compile(backend="llm42", dynamic=True)
    ids = tiny.ids(5, 20)

    def logits(rows: list[int], width: int = 20) -> list[torch.Tensor]:
        given = ids[rows][:, :width]
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return [torch.stack(out.logits)[:, i] for i in range(len(rows))]

    whole = logits([0, 1, 2, 3, 4])
    for rows in ([1], [3, 1], [4, 0, 2]):
        for row, found in zip(rows, logits(rows), strict=True):
            assert torch.equal(found, whole[row])
    assert torch.equal(logits([2], 17)[0], logits([0, 2], 17)[1])
