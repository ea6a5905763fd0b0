"""``llm42::pod_attention`` on a CPU: the bits of paged_attention in every schedule, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_world import Heads, Runner, World, bits

from llm42c.codegen.ops import registry
from llm42c.codegen.ops.pod_attention import check_metadata

registry.load()
BATCHES = 30  # Hypothesis examples


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hybrid() -> list[Any]:
    runner = Runner(World.make([40, 20, 1], Heads(sinks=True, window=17)))
    runner.call([(0, 39)])
    return runner.arguments([(0, 1), (1, 20), (2, 1)], padding=2)


def on_threads(threads: int, arguments: list[Any], *more: Any) -> torch.Tensor:
    torch.set_num_threads(threads)
    op = torch.ops.llm42.pod_attention if more else torch.ops.llm42.paged_attention
    out: torch.Tensor = op(*arguments, *more)
    torch.set_num_threads(1)
    return out


def mixed(heads: Heads, lengths: list[int], rows: list[int], page: int) -> list[Any]:
    """Sequence ``i`` of ``lengths[i]`` tokens, of which the call brings the last ``rows[i]``."""
    runner = Runner(World.make(lengths, heads), page=page)
    before = [(s, n - r) for s, (n, r) in enumerate(zip(lengths, rows, strict=True))]
    runner.call(before)
    return runner.arguments(list(enumerate(rows)), padding=2)


OPTIONS = ({}, {"window": 70}, {"softcap": 4.0, "sinks": True})
HEADS = ((8, 2), (6, 1), (3, 3))  # grouped, one, one each


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_paged_attention_in_every_schedule(dim: int, dtype: torch.dtype):
    """One batch a shape: two prefills (one of them a chunk), six decodes, a window of a verifier."""
    lengths, rows = [300, 530, 260, 257, 600, 90, 17, 1, 33], [300, 40, 1, 1, 1, 1, 1, 1, 5]
    for (q, kv), options, page in zip(HEADS, OPTIONS, (16, 48, 256), strict=True):
        heads = Heads(q, kv, dim, dtype, **options)
        arguments = mixed(heads, lengths, rows, page)
        want = on_threads(1, arguments)
        assert want[:-2].isfinite().all()
        assert bits(want[:-2]).count_nonzero() > want[:-2].numel() * 0.99
        for threads in (1, 2, 3):
            for workers in range(threads + 1):
                got = on_threads(threads, arguments, True, workers)
                assert torch.equal(bits(got), bits(want)), (q, kv, options, page, threads, workers)


@given(data=st.data())
@settings(max_examples=BATCHES, deadline=None)
def test_any_hybrid_batch_any_schedule(data: st.DataObject):
    q, kv = data.draw(st.sampled_from(HEADS))
    heads = Heads(q, kv, data.draw(st.sampled_from((64, 128))), **data.draw(st.sampled_from(OPTIONS)))
    lengths = data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=8))
    rows = [data.draw(st.sampled_from((0, 1, 1, 3, n // 2, n))) for n in lengths]
    rows = [min(r, n) for r, n in zip(rows, lengths, strict=True)]
    arguments = mixed(heads, lengths, rows, data.draw(st.sampled_from((16, 32, 64, 256))))
    want = on_threads(1, arguments)
    threads = data.draw(st.integers(1, 5))
    got = on_threads(threads, arguments, True, data.draw(st.integers(0, 6)))
    assert torch.equal(bits(got), bits(want))


def test_races_do_not_show():
    """The same batch again and again, on more threads than cores, so that work changes hands each time."""
    heads = Heads(4, 2, dtype=torch.float32)
    arguments = mixed(heads, [1100, 700, 300, 20, 256, 513], [64, 200, 1, 1, 1, 1], 16)
    want = bits(on_threads(1, arguments))
    for repeat in range(40):
        threads = 2 + repeat % 5
        assert torch.equal(bits(on_threads(threads, arguments, True, repeat % (threads + 1))), want)


def test_negative_control_the_order_of_folding_would_show():
    """Split results folded in the other order give other bits, so the tests above can fail."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 64, generator=g) for _ in range(3)]
    assert not torch.equal(bits(parts[0] + parts[1] + parts[2]), bits(parts[2] + parts[1] + parts[0]))
    heads = Heads(4, 2, dtype=torch.float32)
    a = mixed(heads, [600], [1], 16)
    b = mixed(replace(heads, window=599), [600], [1], 16)  # one key less
    assert not torch.equal(bits(on_threads(2, a, True, 1)), bits(on_threads(2, b, True, 1)))


def test_writes_the_caches_as_paged_attention_does():
    a, b = hybrid(), hybrid()
    x = torch.ops.llm42.paged_attention(*a)
    y = torch.ops.llm42.pod_attention(*b, True)
    assert torch.equal(bits(x), bits(y))
    assert torch.equal(bits(a[3]), bits(b[3]))  # NaN where nothing was written
    assert torch.equal(bits(a[4]), bits(b[4]))
    assert x[:22].abs().min() < x[:22].abs().max()


def test_fake_agrees_with_the_operator():
    args = [x.nan_to_num() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in hybrid()]
    torch.library.opcheck(
        torch.ops.llm42.pod_attention.default, (*args, True, 1), test_utils=("test_schema", "test_faketensor")
    )


WRONG = [
    (3, lambda t: t.index_fill(1, torch.tensor([0]), 99), r"block_table\[0, 0\] = 99"),
    (2, lambda t: t - 100, "less than the"),
    (2, lambda t: t + 1000, "more than"),
    (0, lambda t: t + 10**6, "neither -1 nor a slot"),
]


@pytest.mark.parametrize(
    ("position", "change", "message"), [*WRONG, (1, lambda t: t.flip(0), "cu_seqlens_q goes from")]
)
def test_inconsistent_metadata_is_an_error(position: int, change: Any, message: str):
    args = hybrid()
    metadata = list(args[5:9])
    check_metadata(args[3].shape[0], 16, len(args[0]), *metadata)
    metadata[position] = change(metadata[position])
    with pytest.raises(ValueError, match=message):
        check_metadata(args[3].shape[0], 16, len(args[0]), *metadata)


@pytest.mark.parametrize(
    ("position", "change", "message"), [*WRONG, (1, lambda t: t.flip(0), "must begin with 0")]
)
def test_a_cpu_checks_whether_or_not_it_is_asked_to(position: int, change: Any, message: str):
    args = hybrid()
    before = bits(args[3]).clone()
    args[5 + position] = change(args[5 + position])
    for checked in (False, True):
        with pytest.raises(ValueError, match=f"pod_attention.*{message}"):
            torch.ops.llm42.pod_attention(*args, checked, 1)
    assert torch.equal(bits(args[3]), before)


def test_a_negative_number_of_workers_is_an_error():
    with pytest.raises(ValueError, match="decode_workers must not be negative, got -1"):
        torch.ops.llm42.pod_attention(*hybrid(), False, -1)
