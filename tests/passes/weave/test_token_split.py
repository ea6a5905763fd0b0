"""Graphs in two halves: equal to the whole for any cut, attention included; joined where they must be."""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.nn.functional as F
import weave_graphs as wg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm42c.passes import graph as g
from llm42c.passes.weave.attention import cut_batch, is_causal_mask
from llm42c.passes.weave.rules import UnsplittableError
from llm42c.passes.weave.schedule import Planner, dag_of, pieces_of_split
from llm42c.passes.weave.split import HALF, split_tokens

# A product of K terms in another order differs by at most K eps per unit of sum |a||b|; the model's rows are
# normed in front of each product, so a few hundred eps bound what two layers do.
BOUND = 400 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def layers():
    with wg.group():
        yield wg.Graph(wg.model(2), wg.tokens(12), 1)


@pytest.mark.parametrize(("count", "cut"), [(2, 1), (3, 1), (3, 2), (17, 8), (17, 1), (17, 16), (64, 32)])
def test_halves_are_the_whole(layers, count, cut):
    split = split_tokens(layers.gm)
    x = layers.arguments(wg.tokens(count))
    (whole,), (halves,) = wg.run_whole(split, x), wg.run_halves(split.gm, x, cut)
    assert split.collectives == 4
    assert (halves - whole).abs().max() <= BOUND * whole.abs().max()


def test_the_graph_itself_is_left_alone(layers):
    before = str(layers.gm.graph)
    split_tokens(layers.gm)
    assert str(layers.gm.graph) == before


def test_no_half_reads_a_later_one(layers):
    """Half 0 depends on nothing of half 1, and weights are not duplicated."""
    split = split_tokens(layers.gm)
    reads_one = set()
    for node in split.gm.graph.nodes:
        if node.meta.get(HALF) == 1 or any(n in reads_one for n in node.all_input_nodes):
            reads_one.add(node)
            assert node.meta.get(HALF) != 0
    weights = [n for n in split.gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    assert len(weights) == 1 + len([n for n in layers.gm.graph.nodes if n.op in ("placeholder", "get_attr")])


def test_a_batch_is_divided_along_its_sequences():
    """[B, S, H] flattened to [B · S, H] and back: S is cut, B is not."""
    weight = torch.randn(wg.HIDDEN, wg.HIDDEN)

    def model(x: Tensor) -> Tensor:
        y = wg.all_reduce(x.reshape(-1, wg.HIDDEN) @ weight)
        return wg.all_reduce(y.reshape(x.shape).exp() @ weight)

    with wg.group():
        graph = wg.Graph(model, wg.tokens(12, batch=3), 1)
        split = split_tokens(graph.gm)
        x = graph.arguments(wg.tokens(7, batch=3))
        (whole,), (halves,) = wg.run_whole(split, x), wg.run_halves(split.gm, x, 3)
        torch.testing.assert_close(halves, whole)


def _attending(mask_of, bidirectional: bool = False):
    weight = torch.randn(wg.HIDDEN, 3 * wg.HIDDEN, generator=torch.Generator().manual_seed(3)) / 6

    def model(x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (x @ weight).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(x), is_causal=False, scale=0.3)
        return wg.all_reduce(a.transpose(1, 2).flatten(2))

    return wg.Graph(model, wg.tokens(12), 1)


def _causal(x: Tensor) -> Tensor:
    position = torch.arange(x.shape[1])
    return (position[None, :] <= position[:, None])[None, None]


MASKS = {
    "causal": _causal,
    "sliding": lambda x: (
        _causal(x) & (torch.arange(x.shape[1])[None] > torch.arange(x.shape[1])[:, None] - 4)
    ),
    "additive": lambda x: torch.where(_causal(x), 0.0, float("-inf")),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_known_to_be_causal(name):
    with wg.group():
        graph = _attending(MASKS[name])
        split = split_tokens(graph.gm)
        x = graph.arguments(wg.tokens(11))
        (whole,), (halves,) = wg.run_whole(split, x), wg.run_halves(split.gm, x, 4)
        torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mask_of",
    [
        lambda x: None,
        lambda x: _causal(x).transpose(-1, -2) | _causal(x),
        lambda x: _causal(x).to(x.dtype),  # 1 and 0, to be added
        lambda x: x[:, None] @ x[:, None].mT,
    ],
    ids=["none", "everything", "numbers", "computed"],
)
def test_attention_that_may_look_ahead_is_refused(mask_of):
    with wg.group(), pytest.raises(UnsplittableError, match=r"later|one row|mask"):
        split_tokens(_attending(mask_of).gm)


def test_a_mask_is_not_believed_by_its_name():
    with wg.group():
        graph = _attending(_causal)
        split = split_tokens(graph.gm)
        found = [n for n in split.original.graph.nodes if g.called(n).endswith("attention_for_cpu")]
        found = found or [n for n in split.original.graph.nodes if "attention" in str(n.target)]
        mask = found[0].kwargs.get("attn_mask") or found[0].args[3]
        assert is_causal_mask(mask, split.prime)
        assert not is_causal_mask(found[0].args[0], split.prime)


def test_what_needs_all_tokens_at_the_end_joins_the_halves():
    layers = wg.model(1)
    head = torch.randn(wg.HIDDEN, 7)

    def model(x: Tensor) -> Tensor:
        return layers(x)[:, -1] @ head

    with wg.group():
        graph = wg.Graph(model, wg.tokens(12), 1)
        split = split_tokens(graph.gm)
        assert split.collectives == 2
        assert len(split.joined) == 1
        x = graph.arguments(wg.tokens(10))
        (whole,), (halves,) = wg.run_whole(split, x), wg.run_halves(split.gm, x, 5)
        torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-5)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    cached=st.lists(st.integers(0, 20), min_size=5, max_size=5),
    padding=st.integers(0, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_cut_batches_keep_every_row_at_its_position(lengths, cached, padding, data):
    """Row i of a sequence stands at kv_len - q_len + i, before and after the cut."""
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total = int(cu[-1]) + padding
    kv = torch.tensor([n + c for n, c in zip(lengths, cached, strict=False)], dtype=torch.int32)
    cut = data.draw(st.integers(0, total))

    def rows(cu: Tensor, kv: Tensor) -> list[tuple[int, int]]:
        found = []
        for s in range(len(kv)):
            count = int(cu[s + 1] - cu[s])
            found += [(s, int(kv[s]) - count + i) for i in range(count)]
        return found

    halves = [rows(*cut_batch(cu, kv, cut, half)) for half in (0, 1)]
    assert halves[0] + halves[1] == rows(cu, kv)
    assert len(halves[0]) == min(cut, int(cu[-1]))


def test_the_divided_graph_has_an_order(layers):
    dag_of(pieces_of_split(split_tokens(layers.gm)))


def test_plans_of_equal_graphs_are_equal_and_of_others_are_not(layers):
    first, again = (Planner(split_tokens(layers.gm), wg.RATES).hash for _ in range(2))
    assert first == again
    assert Planner(split_tokens(layers.gm), wg.RATES, always=True).hash != first
    with wg.group():
        other = wg.Graph(wg.model(1), wg.tokens(12), 1)
        assert Planner(split_tokens(other.gm), wg.RATES).hash != first


def test_equal_rows_of_paged_attention_stay_bit_for_bit():
    """Operators of a fixed order: a cut request has the bits of the uncut one."""
    generator = torch.Generator().manual_seed(0)
    heads, dim, page = 2, 16, 16
    lengths, cached, cut = [5, 1, 9], [7, 20, 0], 8
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, dim, generator=generator) for _ in range(3))
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    kv = torch.tensor([n + c for n, c in zip(lengths, cached, strict=True)]).int()
    table = torch.arange(6).view(3, 2).int()
    slots = torch.cat(
        [torch.arange(c, c + n) + 32 * s for s, (n, c) in enumerate(zip(lengths, cached, strict=True))]
    )
    caches = [torch.randn(6, heads, dim, page, generator=generator), torch.randn(6, heads, page, dim)]
    attention = torch.ops.llm42.paged_attention

    def fresh() -> list[Tensor]:
        return [c.clone() for c in caches]

    kept = fresh()
    whole = attention(q, k, v, *kept, slots, cu, kv, table, 0.25, 0, 0.0, None)
    written, parts = fresh(), []
    for half, (a, b) in enumerate([(0, cut), (cut, total)]):
        own = cut_batch(cu, kv, cut, half)
        part = (t[a:b] for t in (q, k, v))
        parts.append(attention(*part, *written, slots[a:b], *own, table, 0.25, 0, 0.0, None))
    assert graphs.same_bits(torch.cat(parts), whole)
    assert all(graphs.same_bits(a, b) for a, b in zip(written, kept, strict=True))
