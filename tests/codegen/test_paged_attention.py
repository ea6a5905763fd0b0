"""llm42::paged_attention: accuracy against fp64, and bits that depend on a row's own history only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_world import Heads, Runner, World, bits, solo
from torch import Tensor

from llm42c.codegen.cpu import build
from llm42c.codegen.ops import paged_attention, registry

registry.load()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((9, 3, 64), (4, 4, 80), (8, 1, 128), (4, 2, 8), (6, 2, 72), (2, 2, 256), (8, 4, 24), (14, 2, 96))
U32 = 2.0**-24  # unit roundoff of fp32


@pytest.fixture(autouse=True)
def _one_thread_unless_told() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clone(arguments: list[object]) -> list[object]:
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]


def error_bound(arguments: list[object], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The fp64 reference and how far the operator may be from it.

    A score of D products differs by at most (D + 3) u scale |q| |k| (Cauchy-Schwarz over the chain's gamma
    bound), tanh adds 4 u softcap. A weight is exp of a difference of two scores, so it is off by twice
    that, relatively, plus |s - m| u for the difference and 4 u for exp; the sum, the chain of at most 256
    products a split, and the folding of the splits add (256 + 4 splits + 16) u twice (numerator and
    denominator). All of it is relative to the sum of weight * |value|. Last comes rounding to dtype.
    """
    q, k, v, k_cache, v_cache = (a for a in clone(arguments)[:5] if isinstance(a, Tensor))
    rest = arguments[5:]
    scale, softcap = arguments[9], arguments[11]
    assert isinstance(scale, float)
    assert isinstance(softcap, float)
    magnitude = paged_attention.paged_attention.reference(q, k, v.abs(), k_cache, v_cache.abs(), *rest)  # type: ignore[arg-type]
    want = paged_attention.paged_attention.reference(q, k, v, k_cache, v_cache, *rest)  # type: ignore[arg-type]
    longest_key = max(
        k_cache.double().nan_to_num().norm(dim=2).max().item(), k.double().norm(dim=2).max().item()
    )
    score = scale * q.double().norm(dim=2, keepdim=True) * longest_key  # [T, Hq, 1]
    splits = -(-int(arguments[7].max()) // 256)  # type: ignore[attr-defined]
    off = 2 * ((q.shape[2] + 3) * score + 4 * softcap) + 2 * score + 4 + 2 * (256 + 4 * splits + 16)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return want, magnitude * off * U32 * 1.01 + want.abs() * rounding * 1.01 + torch.finfo(dtype).tiny


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Prefill, decode, windows of several rows and an idle sequence in one call; every option."""
    for options in ({}, {"window": 70}, {"softcap": 5.0}, {"sinks": True}):
        heads = Heads(*shape, dtype=dtype, **options)  # type: ignore[arg-type]
        runner = Runner(World.make([700, 37, 30, 261, 600, 1], heads), page=32)
        runner.call([(0, 699), (3, 256), (4, 300)])
        arguments = runner.arguments([(0, 1), (1, 37), (2, 0), (3, 5), (4, 300), (5, 1)], padding=2)
        expected = clone(arguments)
        want, bound = error_bound(expected, dtype)
        got = torch.ops.llm42.paged_attention(*arguments)
        assert got.shape == want.shape
        error = (got.double() - want).abs()
        assert (error <= bound)[:-2].all(), f"{options}: {(error / bound)[:-2].max():.2f} of the bound"
        assert (error[:-2] > 0).any()  # the reference is not the operator itself


@pytest.mark.parametrize("page", [16, 48])
def test_writes_each_row_into_its_slot_and_nothing_else(page: int) -> None:
    runner = Runner(World.make([40, 100], Heads(dtype=torch.float32)), page=page)
    arguments = runner.arguments([(1, 90), (0, 17)])
    slots = arguments[5]
    assert isinstance(slots, Tensor)
    slots[3] = -1
    expected = clone(arguments)
    paged_attention.write_cache(*(expected[i] for i in (1, 2, 3, 4, 5)))  # type: ignore[arg-type]
    torch.ops.llm42.paged_attention(*arguments)
    for i in (3, 4):
        cache, want = arguments[i], expected[i]
        assert isinstance(cache, Tensor)
        assert isinstance(want, Tensor)
        assert torch.equal(bits(cache), bits(want))
        assert cache.isnan().any()  # something was left alone


VARIANTS = (
    Heads(),
    Heads(q=4, kv=4, dim=80, dtype=torch.float32),
    Heads(q=8, kv=1, dim=32, dtype=torch.float16, window=37),
    Heads(q=9, kv=3, softcap=3.0, sinks=True),
    Heads(q=2, kv=2, dim=8, window=300),
)


@pytest.mark.parametrize("heads", VARIANTS, ids=str)
def test_decode_windows_and_prefill_agree(heads: Heads) -> None:
    """Each row in windows of every size at every offset, against one prefill of the whole sequence."""
    n = 290
    world = World.make([n], heads)
    want = bits(solo(world, 0))
    for size in (1, 2, 3, 7, 16, 33, 64, 256, 289):
        runner = Runner(world, seed=size)
        parts = [runner.call([(0, min(size, n - at))])[0] for at in range(0, n, size)]
        assert torch.equal(bits(torch.cat(parts)), want), size


@pytest.mark.parametrize("heads", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_page_size_pages_threads_and_padding_do_not_matter(heads: Heads, threads: int) -> None:
    world = World.make([530, 3, 77], heads)
    want = [bits(solo(world, s)) for s in range(3)]
    torch.set_num_threads(threads)
    for page in (16, 32, 48, 64):
        runner = Runner(world, page=page, seed=page, spare_pages=threads)
        first = runner.call([(2, 70), (0, 400)], padding=threads)
        second = runner.call([(0, 130), (1, 3), (2, 7)], padding=3)
        assert torch.equal(bits(torch.cat([first[1], second[0]])), want[0])
        assert torch.equal(bits(second[1]), want[1])
        assert torch.equal(bits(torch.cat([first[0], second[2]])), want[2])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_schedule_gives_the_bits_of_a_solo_prefill(data: st.DataObject) -> None:
    heads = data.draw(st.sampled_from(VARIANTS))
    lengths = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=5))
    world = World.make(lengths, heads, seed=data.draw(st.integers(0, 3)))
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    runner = Runner(world, page=data.draw(st.sampled_from((16, 32, 64))), seed=data.draw(st.integers(0, 9)))
    outputs: list[list[Tensor]] = [[] for _ in lengths]
    while any(done < n for done, n in zip(runner.done, lengths, strict=True)):
        takes = []
        for s in data.draw(st.permutations(range(len(lengths)))):
            left = lengths[s] - runner.done[s]
            takes.append((s, min(left, data.draw(st.sampled_from((0, 1, 1, 4, 16, 90, 600))))))
        if not any(n for _, n in takes):
            takes = [(s, lengths[s] - runner.done[s]) for s in range(len(lengths))]
        for (s, _), out in zip(takes, runner.call(takes, padding=data.draw(st.integers(0, 2))), strict=True):
            outputs[s].append(out)
    for s in range(len(lengths)):
        assert torch.equal(bits(torch.cat(outputs[s])), bits(solo(world, s)))


def test_every_row_offset_and_neighbour() -> None:
    """One decode row at every place of a batch of windows, with other neighbours each time."""
    heads = Heads(dtype=torch.float32)
    world = World.make([200, 64, 5, 300, 17, 90], heads)
    want = bits(solo(world, 0))[-1]
    for place in range(6):
        for others in ((1, 2), (3, 4), (5, 1, 3), ()):
            runner = Runner(world, seed=place)
            runner.call([(0, 199)])
            takes = [(s, len(world.q[s])) for s in others]
            takes.insert(min(place, len(takes)), (0, 1))
            out = runner.call(takes)[min(place, len(others))]
            assert torch.equal(bits(out[0]), want)


def test_sequences_may_share_pages_written_in_the_same_call() -> None:
    """A prefix that one sequence writes is read by another one of the same call."""
    world = World.make([64, 64], Heads())
    for t in (world.q, world.k, world.v):
        t[1][:32] = t[0][:32]
    want = bits(solo(world, 1))
    runner = Runner(world)
    runner.tables[1] = torch.cat([runner.tables[0][:2], runner.tables[1][2:]])
    runner.done = [0, 32]
    out = runner.call([(1, 32), (0, 64)])[0]
    assert torch.equal(bits(out), want[32:])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_later_token_does_not_reach_back(which: str, poison: float) -> None:
    """NaN or infinity in one token's key or value leaves all earlier rows of the same prefill alone."""
    world = World.make([150], Heads(q=3, kv=3, dtype=torch.float32))
    want = bits(solo(world, 0))
    at = 101
    getattr(world, which)[0][at] = poison
    got = Runner(world).call([(0, 150)])[0]
    assert torch.equal(bits(got)[:at], want[:at])
    assert not torch.isfinite(got[at:]).all()


def test_a_window_forgets() -> None:
    world = World.make([400], Heads(window=50, dtype=torch.float32))
    want = bits(solo(world, 0))
    for t in (world.k, world.v):
        t[0][:300] = math.nan
    got = Runner(world).call([(0, 400)])[0]
    assert torch.equal(bits(got)[349:], want[349:])
    assert got[:349].isnan().all()


def test_strided_views_of_a_merged_projection() -> None:
    world = World.make([45], Heads())
    want = bits(solo(world, 0))
    runner = Runner(world)
    arguments = runner.arguments([(0, 45)])
    q, k, v = arguments[:3]
    assert isinstance(q, Tensor)
    merged = torch.cat([t.flatten(1) for t in (q, k, v)], 1)  # type: ignore[union-attr]
    sizes = [t.shape[1] * t.shape[2] for t in (q, k, v)]  # type: ignore[union-attr]
    arguments[:3] = [t.unflatten(1, (-1, 64)) for t in merged.split(sizes, 1)]
    assert torch.equal(bits(torch.ops.llm42.paged_attention(*arguments)), want)
    arguments[:3] = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in arguments[:3]]  # type: ignore[union-attr]
    assert torch.equal(bits(torch.ops.llm42.paged_attention(*arguments)), want)


def test_nothing_to_do() -> None:
    runner = Runner(World.make([5], Heads()))
    assert runner.call([], padding=3) == []
    assert runner.call([(0, 0)], padding=0)[0].shape == (0, 6, 64)


def test_same_bits_on_every_isa(digest_on: Callable[[str, str], str]) -> None:
    code = """
    from paged_world import Heads, Runner, World
    outs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for options in ({}, {"window": 40, "softcap": 2.0, "sinks": True}):
            runner = Runner(World.make([300, 20], Heads(dtype=dtype, dim=40, **options)))
            outs += runner.call([(0, 280)]) + runner.call([(0, 20), (1, 20)])
    print(digest(*outs))
    """
    assert digest_on(build.widest_isa(), code) == digest_on("portable", code)


def test_negative_control_torch_attention_depends_on_the_batch() -> None:
    """The property tested above is not free: the stock operator does not have it."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, n, 64, generator=g) for n in (8, 300, 300))
    together = F.scaled_dot_product_attention(q, k, v)
    alone = torch.cat([F.scaled_dot_product_attention(q[:, :, i : i + 1], k, v) for i in range(8)], 2)
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.equal(bits(together), bits(alone))


def test_negative_control_the_place_of_a_split_shows_in_the_bits() -> None:
    """Keys 16..600 as keys 0..584: same mathematics, other splits, other bits."""
    world = World.make([600], Heads(dtype=torch.float32))
    shifted = World.make([600], Heads(dtype=torch.float32, window=584))
    moved = World(world.heads, [world.q[0][16:]], [world.k[0][16:]], [world.v[0][16:]], None)
    a, b = solo(shifted, 0)[-1], solo(moved, 0)[-1]
    assert torch.allclose(a, b, atol=1e-5)
    assert not torch.equal(bits(a), bits(b))


def test_opcheck() -> None:
    runner = Runner(World.make([20, 33], Heads(sinks=True)))
    arguments = runner.arguments([(0, 20), (1, 30)], padding=1)
    torch.library.opcheck(torch.ops.llm42.paged_attention.default, tuple(arguments))


Q, K, V, K_CACHE, V_CACHE, SLOTS, CU, LENS, TABLE, SCALE, WINDOW, SOFTCAP, SINKS = range(13)
MISTAKES: dict[str, tuple[int, Callable[[Tensor], object], str]] = {
    "heads": (K, lambda t: t[:, :, :32], "expected q"),
    "q dtype": (Q, lambda t: t.float(), "one dtype"),
    "cache dtype": (K_CACHE, lambda t: t.float(), "one dtype"),
    "cache layout": (K_CACHE, lambda t: t.transpose(2, 3), "k_cache"),
    "cache pages": (V_CACHE, lambda t: t[:-1], "v_cache"),
    "page size": (K_CACHE, lambda t: t[..., :8].contiguous(), "v_cache"),
    "slot dtype": (SLOTS, lambda t: t.int(), "slot_mapping"),
    "slot range": (SLOTS, lambda t: t + 10_000, "slot_mapping"),
    "slot below -1": (SLOTS, lambda t: t * 0 - 2, "slot_mapping"),
    "cu dtype": (CU, lambda t: t.long(), "cu_seqlens_q"),
    "cu begins": (CU, lambda t: t + 1, "begin with 0"),
    "cu decreases": (CU, lambda t: torch.tensor([0, 20, 10], dtype=torch.int32), "must not decrease"),
    "cu too long": (CU, lambda t: torch.tensor([0, 20, 60], dtype=torch.int32), "kv_lens|rows"),
    "fewer keys than rows": (LENS, lambda t: t - 1, "less than"),
    "more keys than pages": (LENS, lambda t: t + 100, "more than"),
    "page id": (TABLE, lambda t: t + 100, "is no page"),
    "negative page id": (TABLE, lambda t: t * 0 - 1, "is no page"),
    "sequences": (LENS, lambda t: t[:1], "expected cu_seqlens_q"),
    "window": (WINDOW, lambda _: -1, "window"),
    "softcap": (SOFTCAP, lambda _: -1.0, "softcap"),
    "sinks": (SINKS, lambda _: torch.zeros(5), "sinks"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(mistake: str) -> None:
    index, change, message = MISTAKES[mistake]
    runner = Runner(World.make([20, 33], Heads()))
    arguments = runner.arguments([(0, 20), (1, 30)])
    arguments[index] = change(arguments[index])  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError), match=f"paged_attention.*({message})"):
        torch.ops.llm42.paged_attention(*arguments)
    caches = [arguments[i] for i in (K_CACHE, V_CACHE)]
    assert all(c.isnan().all() for c in caches if isinstance(c, Tensor))  # refused before anything is written
