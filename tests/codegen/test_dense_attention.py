"""llm42::dense_attention: SDPA's meaning, fp64 bounds, gradients, and bits that only visible keys decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_world import Heads, Runner, World, bits
from torch import Tensor

from llm42c.codegen.cpu import build
from llm42c.codegen.ops import registry
from llm42c.codegen.ops.dense_attention import dense_attention

registry.load()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U32 = 2.0**-24  # unit roundoff of fp32


@pytest.fixture(autouse=True)
def _one_thread_unless_told() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(
    batch: int = 2,
    heads: int = 6,
    kv_heads: int = 2,
    q_len: int = 40,
    kv_len: int = 40,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim))
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return q, k, v


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1])
    out = torch.ops.llm42.dense_attention(q, k, v, mask, scale, causal, window, softcap)
    assert isinstance(out, Tensor)
    return out


def random_mask(q_len: int, kv_len: int, shape: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """Bool; some rows see nothing."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(*shape, q_len, kv_len, generator=g) < 0.7
    mask[..., :: max(1, q_len // 3), :] = False
    return mask


def as_added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 6, 2, 300, 300, 64), (3, 4, 4, 1, 530, 80), (1, 8, 1, 17, 40, 8), (2, 4, 2, 70, 33, 24)],
    ids=str,
)
def test_accuracy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The bound is that of test_paged_attention; an added mask is one more rounding of a score."""
    q, k, v = inputs(*shape, dtype=dtype)
    q_len, kv_len = q.shape[2], k.shape[2]
    mask = random_mask(q_len, kv_len, (shape[0], 1))
    added = as_added(random_mask(q_len, kv_len, seed=1)) + torch.randn(q_len, kv_len)
    cases: list[dict[str, Any]] = [{}, {"causal": True}, {"mask": mask}, {"mask": added}]
    cases += [{"mask": mask, "causal": True, "window": 20}, {"window": 50, "softcap": 3.0}]
    norms = q.double().norm(dim=-1, keepdim=True) * k.double().norm(dim=-1).max()
    score = norms / math.sqrt(q.shape[-1]) + 6
    for case in cases:
        options = {"mask": None, "causal": False, "window": 0, "softcap": 0.0, **case}
        scale = 1 / math.sqrt(q.shape[-1])
        want, magnitude = (
            dense_attention.reference(q, k, x, options["mask"], scale, *list(options.values())[1:])
            for x in (v, v.abs())
        )
        splits = -(-kv_len // 256)
        off = 2 * ((q.shape[-1] + 4) * score + 4 * options["softcap"]) + 2 * score + 4
        off = off + 2 * (256 + 4 * splits + 16)
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        bound = magnitude * off * U32 * 1.01 + want.abs() * rounding * 1.01 + torch.finfo(dtype).tiny
        error = (attend(q, k, v, **case).double() - want).abs()
        assert (error <= bound).all(), f"{case.keys()}: {(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7), (1, 9), (5, 9), (9, 5)], ids=str)
def test_means_what_sdpa_means(lengths: tuple[int, int], causal: bool) -> None:
    """Also is_causal for Sq != Sk (upper left), GQA, masks of every rank, and rows that see nothing: 0."""
    q, k, v = inputs(q_len=lengths[0], kv_len=lengths[1])
    wide = q.double(), k.double(), v.double()
    masks: list[Tensor | None] = [None]
    if not causal:
        masks += [random_mask(*lengths), random_mask(*lengths, (2, 1)), random_mask(1, lengths[1], (2, 1))]
        masks += [random_mask(*lengths, (6,)), as_added(random_mask(*lengths, (2, 6))).double()]
    for mask in masks:
        want = F.scaled_dot_product_attention(*wide, attn_mask=mask, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(attend(q, k, v, mask, causal).double(), want, atol=1e-6, rtol=1e-5)
        if mask is not None:
            assert (want == 0).all(-1).any()


def test_rows_do_not_depend_on_batch_or_length_of_the_query() -> None:
    """Every row of a causal prefill, decoded alone, for several head shapes and thread counts."""
    for heads, kv_heads, dim, dtype in ((6, 2, 64, torch.bfloat16), (4, 4, 24, torch.float32)):
        q, k, v = inputs(3, heads, kv_heads, 290, 290, dim, dtype)
        torch.set_num_threads(1)
        want = bits(attend(q, k, v, causal=True))
        torch.set_num_threads(3)
        assert torch.equal(bits(attend(q, k, v, causal=True)), want)
        for b in range(3):
            assert torch.equal(
                bits(attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)), want[b : b + 1]
            )
        for i in (0, 1, 15, 16, 100, 255, 256, 289):
            alone = attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
            assert torch.equal(bits(alone), want[:, :, i : i + 1])
        positions = torch.arange(290)
        for begin, end in ((3, 90), (90, 200), (200, 290)):
            visible = positions <= positions[begin:end, None]
            part = attend(q[:, :, begin:end], k, v, mask=visible)
            assert torch.equal(bits(part), want[:, :, begin:end])


def test_all_ways_to_say_causal_agree() -> None:
    q, k, v = inputs(q_len=70, kv_len=70, dtype=torch.bfloat16)
    visible = torch.ones(70, 70, dtype=torch.bool).tril()
    want = bits(attend(q, k, v, causal=True))
    lowest = torch.zeros(70, 70).masked_fill(~visible, torch.finfo(torch.float32).min)
    for mask in (visible, visible[None, None].expand(2, 6, 70, 70), as_added(visible), lowest):
        assert torch.equal(bits(attend(q, k, v, mask)), want)
    window = visible & ~torch.ones(70, 70, dtype=torch.bool).tril(-13)
    assert torch.equal(bits(attend(q, k, v, window)), bits(attend(q, k, v, causal=True, window=13)))
    part = attend(q[:, :, 60:], k, v, visible[60:], window=13)
    assert torch.equal(bits(part), bits(attend(q, k, v, window)[:, :, 60:]))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_hidden_keys_take_no_part(data: st.DataObject) -> None:
    """NaN in hidden keys and values, more hidden keys on both sides, threads: the same bits."""
    q_len, kv_len = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 600))
    dtype = data.draw(st.sampled_from(DTYPES))
    q, k, v = inputs(2, 4, data.draw(st.sampled_from((1, 2, 4))), q_len, kv_len, 16, dtype)
    mask = torch.rand(2, 1, 1, kv_len, generator=torch.Generator().manual_seed(kv_len)) < data.draw(
        st.sampled_from((0.1, 0.5, 0.9, 0.99))
    )
    if data.draw(st.booleans()):
        mask = mask & random_mask(q_len, kv_len)
    mask[..., 0] = mask.any(-1)  # the first visible key, where indices begin, is the same for all rows
    want = bits(attend(q, k, v, mask))
    left, right = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 300))
    hidden = ~mask.any(2)[:, 0]  # hidden from all rows
    k, v = (t.masked_fill(hidden[:, None, :, None], math.nan) for t in (k, v))
    k, v = (F.pad(t, (0, 0, left, right), value=math.nan) for t in (k, v))
    wider = F.pad(mask, (left, right))
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    assert torch.equal(bits(attend(q, k, v, wider)), want)
    assert torch.equal(bits(attend(q, k, v, as_added(wider))), want)
    row = data.draw(st.integers(0, q_len - 1))
    its_mask = wider if wider.shape[2] == 1 else wider[:, :, row : row + 1]
    assert torch.equal(bits(attend(q[:, :, row : row + 1], k, v, its_mask)), want[:, :, row : row + 1])


def test_a_poisoned_value_reaches_only_the_rows_that_see_it() -> None:
    q, k, v = inputs(1, 2, 2, 50, 50)
    mask = random_mask(50, 50)
    want = bits(attend(q, k, v, mask))
    v[:, :, 33] = math.inf
    got = attend(q, k, v, mask)
    sees = mask[:, 33]
    assert torch.equal(bits(got)[:, :, ~sees], want[:, :, ~sees])
    assert not torch.isfinite(got[:, :, sees]).any()


@pytest.mark.parametrize("options", [{}, {"window": 37}, {"softcap": 2.0}], ids=str)
def test_same_bits_as_paged_attention(options: dict[str, Any]) -> None:
    world = World.make([530], Heads(**options))
    paged = Runner(world, page=32).call([(0, 530)])[0]
    q, k, v = (t[0][None].transpose(1, 2) for t in (world.q, world.k, world.v))
    assert torch.equal(bits(attend(q, k, v, causal=True, **options))[0].transpose(0, 1), bits(paged))


def test_any_strides_and_the_layout_of_the_output() -> None:
    q, k, v = inputs(dtype=torch.bfloat16)
    want = attend(q, k, v, causal=True)
    assert want.transpose(1, 2).is_contiguous()
    permuted = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    odd = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    cache = [F.pad(t, (0, 0, 3, 5))[:, :, 3:-5] for t in (q, k, v)]
    for same in (permuted, odd, cache):
        assert torch.equal(bits(attend(same[0], same[1], same[2], causal=True)), bits(want))


def test_empty() -> None:
    q, k, v = inputs(q_len=3, kv_len=5)
    assert torch.equal(attend(q, k[:, :, :0], v[:, :, :0]), torch.zeros_like(q))
    assert attend(q[:, :, :0], k, v).shape == (2, 6, 0, 64)
    assert attend(q[:0], k[:0], v[:0]).shape == (0, 6, 3, 64)


@pytest.mark.parametrize("pad", [1, 10, 16, 300])
@pytest.mark.parametrize("added", [False, True])
def test_left_padding_does_not_matter(pad: int, added: bool) -> None:
    """A left-padded batch, as `generate` makes it: prefill and decode of each row as without padding."""
    lengths = (290, 290 - pad % 290)
    q, k, v = inputs(2, 6, 2, 290, 290, dtype=torch.bfloat16)
    position = torch.arange(290)
    starts = torch.tensor([290 - n for n in lengths])
    mask = (position <= position[:, None]) & (position >= starts[:, None, None, None])
    hidden = (position < starts[:, None])[:, None, :, None]
    k, v = k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.nan)
    prefill = attend(q, k, v, as_added(mask) if added else mask)
    decode = attend(q[:, :, -1:], k, v, as_added(mask[:, :, -1:]) if added else mask[:, :, -1:])
    for b, n in enumerate(lengths):
        alone = attend(q[b : b + 1, :, -n:], k[b : b + 1, :, -n:], v[b : b + 1, :, -n:], causal=True)
        assert torch.equal(bits(prefill[b, :, -n:]), bits(alone[0]))
        assert torch.equal(bits(decode[b]), bits(alone[0, :, -1:]))
        assert torch.equal(bits(prefill[b, :, : 290 - n]), torch.zeros_like(bits(prefill[b, :, : 290 - n])))


def test_negative_control_the_order_of_keys_shows_in_the_bits() -> None:
    q, k, v = inputs(1, 6, 2, 1, 590)
    rolled = attend(q, k.roll(10, 2), v.roll(10, 2))
    plain = attend(q, k, v)
    torch.testing.assert_close(rolled, plain, atol=1e-6, rtol=1e-5)
    assert not torch.equal(bits(rolled), bits(plain))


def test_same_bits_on_every_isa(digest_on: Callable[[str, str], str]) -> None:
    code = """
    from test_dense_attention import attend, inputs, random_mask
    outs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = inputs(q_len=50, kv_len=300, dim=40, dtype=dtype)
        outs += [attend(q, k, v, random_mask(50, 300)), attend(q, k, v, window=20, softcap=3.0)]
    print(digest(*outs))
    """
    assert digest_on(build.widest_isa(), code) == digest_on("portable", code)


@pytest.mark.parametrize(
    "case",
    [{}, {"causal": True, "window": 4}, {"softcap": 1.5}, {"mask": "bool"}, {"mask": "added"}],
    ids=str,
)
def test_gradients(case: dict[str, Any]) -> None:
    """Against fp64 autograd through the reference; recomputing in fp32 chains about 50 roundings."""
    q, k, v = inputs(q_len=9, kv_len=9, dim=16)
    options: dict[str, Any] = {"mask": None, "causal": False, "window": 0, "softcap": 0.0, **case}
    if options["mask"] == "bool":
        options["mask"] = random_mask(9, 9, (2, 1))
    elif options["mask"] == "added":
        options["mask"] = torch.randn(6, 9, 9, requires_grad=True)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    if options["mask"] is not None and options["mask"].requires_grad:
        leaves.append(options["mask"])
    seed = torch.randn(q.shape)
    got = torch.autograd.grad(attend(q, k, v, **options), leaves, seed)
    want = torch.autograd.grad(
        dense_attention.reference(q, k, v, options["mask"], 0.25, *list(options.values())[1:]),
        leaves,
        seed.double(),
    )
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=50 * 2 * U32 * b.abs().max().item() * 9, rtol=0)


def test_opcheck() -> None:
    q, k, v = inputs(q_len=5, kv_len=7, dim=16)
    op = torch.ops.llm42.dense_attention.default
    torch.library.opcheck(op, (q, k, v, None, 0.25, True, 0, 0.0))
    torch.library.opcheck(op, (q, k, v, random_mask(5, 7), 0.25, False, 3, 0.0))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(op, (*leaves, as_added(random_mask(5, 7)), 0.25, False, 0, 2.0))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"q": torch.zeros(6, 5, 16)}, "expected q"),
    "heads": ({"k": torch.zeros(2, 4, 7, 16), "v": torch.zeros(2, 4, 7, 16)}, "expected q"),
    "lengths of k and v": ({"v": torch.zeros(2, 2, 8, 16)}, "expected q"),
    "dtype": ({"v": torch.zeros(2, 2, 7, 16, dtype=torch.bfloat16)}, "one dtype"),
    "dim": ({n: torch.zeros(2, 2, 7, 12) for n in "qkv"}, "multiple of 8"),
    "double": ({n: torch.zeros(2, 2, 7, 16, dtype=torch.float64) for n in "qkv"}, "expected float32"),
    "mask shape": ({"mask": torch.ones(5, 8, dtype=torch.bool)}, "does not broadcast"),
    "mask rank": ({"mask": torch.ones(1, 1, 1, 5, 7, dtype=torch.bool)}, "does not broadcast"),
    "mask dtype": ({"mask": torch.ones(5, 7, dtype=torch.int64)}, "bool or float"),
    "window": ({"window": -1}, "window"),
    "softcap": ({"softcap": -1.0}, "softcap"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    q, k, v = inputs(q_len=5, kv_len=7, dim=16)
    with pytest.raises((ValueError, TypeError), match=f"dense_attention.*{message}"):
        attend(**{"q": q, "k": k, "v": v, **changes})
