"""``llm42::varlen_attention``: the bits of paged_attention, whatever the layout and the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paged_world import Heads, Runner, World, bits
from torch import Tensor

from llm42c.codegen.cpu.target import TARGET
from llm42c.codegen.ops import registry, varlen_attention

registry.load()
LENGTHS, ROWS = [300, 270, 40, 600, 5], [44, 270, 1, 1, 5]


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def calls(heads: Heads, page: int = 32) -> tuple[list[Any], list[Any], list[Any]]:
    """The same batch for paged_attention, and token by token for varlen: in pages, and in packed rows."""
    world = World.make(LENGTHS, heads)
    runner = Runner(world, page=page)
    runner.call([(s, n - r) for s, (n, r) in enumerate(zip(LENGTHS, ROWS, strict=True))])
    paged = runner.arguments(list(enumerate(ROWS)), padding=1)
    cu, lens, table, *options = paged[6:]
    out = torch.ops.llm42.paged_attention(*paged)  # so that all keys are in the cache
    assert out[:-1].isfinite().all()
    k_pool = runner.k_cache.permute(0, 3, 1, 2)  # [pages, page, Hkv, D], D strided
    pool = torch.stack((k_pool, runner.v_cache.transpose(1, 2)), 2)  # keys and values of a token side by side
    rows = [torch.cat(x) for x in (world.k, world.v)]
    cu_k = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    table = table.clamp(min=0)
    by_page = [paged[0], pool[:, :, 0], pool[:, :, 1], cu, lens, None, table, *options]
    by_row = [paged[0], *rows, cu, lens, cu_k, None, *options]
    return [out], by_page, by_row


@pytest.mark.parametrize(
    "heads",
    [
        Heads(),
        Heads(4, 4, 80, torch.float32, window=50),
        Heads(8, 1, 128, torch.float16, softcap=3.0, sinks=True),
        Heads(2, 2, 8),
    ],
    ids=str,
)
def test_bits_of_paged_attention(heads: Heads):
    (want,), by_page, by_row = calls(heads)
    for arguments in (by_page, by_row):
        for threads, workers in ((1, 0), (1, 1), (2, 0), (2, 1), (3, 2)):
            torch.set_num_threads(threads)
            with TARGET.step(workers):
                got = torch.ops.llm42.varlen_attention(*arguments)
            assert torch.equal(bits(got), bits(want)), (threads, workers)


def test_reference_is_that_of_paged_attention():
    _, by_page, by_row = calls(Heads(4, 2, 16, torch.float32))
    for arguments in (by_page, by_row):
        filled = [x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
        want = varlen_attention.varlen_attention.reference(*filled)
        got = torch.ops.llm42.varlen_attention(*filled)
        torch.testing.assert_close(got[:-1].double(), want[:-1], rtol=0, atol=2e-5)


MISTAKES: dict[str, tuple[int, Callable[[Any], Any], str]] = {
    "page size": (1, lambda t: t[:, :8], "v .pages"),
    "dims": (1, lambda t: t[0], "expected q"),
    "both": (5, lambda _: torch.zeros(6, dtype=torch.int32), "either cu_seqlens_k or block_table"),
    "page id": (6, lambda t: t + 1000, "is no page"),
    "kv_lens": (4, lambda t: t + 1000, "more than"),
    "dtype": (2, lambda t: t.double(), "one dtype"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(mistake: str):
    index, change, message = MISTAKES[mistake]
    _, arguments, _ = calls(Heads())
    arguments[index] = change(arguments[index])
    with pytest.raises((ValueError, TypeError), match=f"varlen_attention.*({message})"):
        torch.ops.llm42.varlen_attention(*arguments)


def test_keys_beyond_the_rows_are_refused():
    _, _, arguments = calls(Heads())
    arguments[5] = arguments[5] + 10
    with pytest.raises(ValueError, match="but there are 1215"):
        torch.ops.llm42.varlen_attention(*arguments)


def test_varlen_opcheck():
    _, _, by_row = calls(Heads())
    torch.library.opcheck(torch.ops.llm42.varlen_attention.default, tuple(by_row))
