"""Hybrid batches of ``llm42::paged_attention`` on a CPU: one set of bits in every schedule of a step."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_world import Heads, Runner, World, bits

from llm42c.codegen.cpu import target as cpu
from llm42c.codegen.cpu.target import TARGET
from llm42c.codegen.ops import registry
from llm42c.codegen.ops.paged_attention import check_metadata
from llm42c.device import CPU, in_steps
from llm42c.weave.runner import ThreadLane

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


def on_threads(threads: int, arguments: list[Any], workers: int = 0) -> torch.Tensor:
    torch.set_num_threads(threads)
    with TARGET.step(workers):
        out: torch.Tensor = torch.ops.llm42.paged_attention(*arguments)
    torch.set_num_threads(1)
    return out


def workers() -> int:
    """Of this thread's step."""
    found = cpu._set_decode_workers()(0)
    cpu._set_decode_workers()(found)
    return found


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
def test_one_set_of_bits_in_every_schedule(dim: int, dtype: torch.dtype):
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
                got = on_threads(threads, arguments, workers)
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
    got = on_threads(threads, arguments, data.draw(st.integers(0, 6)))
    assert torch.equal(bits(got), bits(want))


def test_races_do_not_show():
    """The same batch again and again, on more threads than cores, so that work changes hands each time."""
    heads = Heads(4, 2, dtype=torch.float32)
    arguments = mixed(heads, [1100, 700, 300, 20, 256, 513], [64, 200, 1, 1, 1, 1], 16)
    want = bits(on_threads(1, arguments))
    for repeat in range(40):
        threads = 2 + repeat % 5
        assert torch.equal(bits(on_threads(threads, arguments, repeat % (threads + 1))), want)


def test_negative_control_the_order_of_folding_would_show():
    """Split results folded in the other order give other bits, so the tests above can fail."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 64, generator=g) for _ in range(3)]
    assert not torch.equal(bits(parts[0] + parts[1] + parts[2]), bits(parts[2] + parts[1] + parts[0]))
    heads = Heads(4, 2, dtype=torch.float32)
    a = mixed(heads, [600], [1], 16)
    b = mixed(replace(heads, window=599), [600], [1], 16)  # one key less
    assert not torch.equal(bits(on_threads(2, a, 1)), bits(on_threads(2, b, 1)))


def test_a_step_is_of_its_thread_and_ends() -> None:
    """Steps nest, an error ends one, and another thread has its own."""
    assert workers() == 0
    with TARGET.step(3):
        with contextlib.suppress(KeyError), TARGET.step(5):
            assert workers() == 5
            raise KeyError
        assert workers() == 3
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(workers).result() == 0
    with TARGET.step():
        assert workers() >= 1, "as many as fill the memory"
    assert workers() == 0


def test_layers_and_lanes_are_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "filling_the_memory", lambda: 7)

    assert in_steps(workers, CPU)() == 7
    lane = ThreadLane()
    assert lane.wait(lane.start(workers)) == 7
    assert workers() == 0


def test_the_schedule_does_not_show_in_the_caches() -> None:
    a, b = hybrid(), hybrid()
    x, y = on_threads(1, a), on_threads(2, b, 1)
    assert torch.equal(bits(x), bits(y))
    assert torch.equal(bits(a[3]), bits(b[3]))  # NaN where nothing was written
    assert torch.equal(bits(a[4]), bits(b[4]))
    assert x[:22].abs().min() < x[:22].abs().max()


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
def test_a_cpu_checks_without_being_asked(position: int, change: Any, message: str):
    args = hybrid()
    before = bits(args[3]).clone()
    args[5 + position] = change(args[5 + position])
    with pytest.raises(ValueError, match=f"paged_attention.*{message}"):
        torch.ops.llm42.paged_attention(*args)
    assert torch.equal(bits(args[3]), before)


def test_a_negative_number_of_workers_is_an_error():
    with pytest.raises(ValueError, match="decode_workers must not be negative, got -1"), TARGET.step(-1):
        pass
