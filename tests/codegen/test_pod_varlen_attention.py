"""``llm42::pod_varlen_attention`` and ``pod_dense_attention``: the bits of the calls they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paged_world import Heads, Runner, World, bits
from torch import Tensor

from llm42c.codegen.ops import pod_varlen_attention, registry

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
            got = torch.ops.llm42.pod_varlen_attention(*arguments, workers)
            assert torch.equal(bits(got), bits(want)), (threads, workers)


def test_reference_is_that_of_paged_attention():
    _, by_page, by_row = calls(Heads(4, 2, 16, torch.float32))
    for arguments in (by_page, by_row):
        filled = [x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
        want = pod_varlen_attention.pod_varlen_attention.reference(*filled)
        got = torch.ops.llm42.pod_varlen_attention(*filled)
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
    with pytest.raises((ValueError, TypeError), match=f"pod_varlen_attention.*({message})"):
        torch.ops.llm42.pod_varlen_attention(*arguments)


def test_keys_beyond_the_rows_are_refused():
    _, _, arguments = calls(Heads())
    arguments[5] = arguments[5] + 10
    with pytest.raises(ValueError, match="but there are 1215"):
        torch.ops.llm42.pod_varlen_attention(*arguments)


def test_varlen_opcheck():
    _, _, by_row = calls(Heads())
    torch.library.opcheck(torch.ops.llm42.pod_varlen_attention.default, (*by_row, 1))


def dense_calls(dtype: torch.dtype = torch.bfloat16) -> tuple[list[Any], list[Any]]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    mask = torch.rand(3, 1, 1, 300, generator=g) < 0.7
    prefill = [randn(1, 6, 270, 64), randn(1, 2, 270, 64), randn(1, 2, 270, 64), None, 0.125, True, 0, 0.0]
    decode = [randn(3, 4, 1, 80), randn(3, 4, 300, 80), randn(3, 4, 300, 80), mask, 0.1, False, 0, 2.0]
    return prefill, decode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_pair_gives_the_bits_of_its_calls(dtype: torch.dtype):
    prefill, decode = dense_calls(dtype)
    torch.set_num_threads(1)
    want = [torch.ops.llm42.dense_attention(*x) for x in (prefill, decode)]
    assert all(x.isfinite().all() and x.count_nonzero() for x in want)
    for threads, workers in ((1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 1)):
        torch.set_num_threads(threads)
        got = torch.ops.llm42.pod_dense_attention(*prefill, *decode, workers)
        for x, y in zip(got, want, strict=True):
            assert x.stride() == y.stride()
            assert torch.equal(bits(x), bits(y)), (threads, workers)


def test_dense_pair_of_two_dtypes_is_refused():
    (prefill, _), (_, decode) = dense_calls(), dense_calls(torch.float32)
    with pytest.raises(TypeError, match="both calls must have one dtype"):
        torch.ops.llm42.pod_dense_attention(*prefill, *decode)


def test_dense_opcheck():
    prefill, decode = dense_calls()
    torch.library.opcheck(torch.ops.llm42.pod_dense_attention.default, (*prefill, *decode, 1))
