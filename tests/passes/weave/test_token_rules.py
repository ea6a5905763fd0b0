"""Which operators may be computed in two halves of the tokens, and which are refused with a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import weave_graphs as wg
from torch import Tensor

from llm42c.passes.weave.attention import is_attention
from llm42c.passes.weave.rules import UnsplittableError
from llm42c.passes.weave.split import split_tokens

W = torch.randn(wg.HIDDEN, wg.HIDDEN, generator=torch.Generator().manual_seed(0)) / 6

TOKENWISE = {
    "pointwise": lambda y: torch.where(y > 0, y.exp(), y * 2).clamp(max=3.0) + y.to(torch.float64).float(),
    "functions": lambda y: torch.special.erfinv(y.tanh() * 0.5) + y.sinh().atan2(y).hypot(y),
    "in place": lambda y: y.mul(2).add_(y).clamp_(max=3.0),
    "broadcast": lambda y: y * torch.arange(y.shape[1])[None, :, None] + torch.ones(wg.HIDDEN),
    "norm": lambda y: F.layer_norm(y, (wg.HIDDEN,)) + F.rms_norm(y, (wg.HIDDEN,)),
    "softmax": lambda y: y.softmax(-1) + y.log_softmax(-1) + y.cumsum(-1),
    "reductions": lambda y: y.sum(-1, keepdim=True) + y.amax(-1, keepdim=True) + y.var(-1, keepdim=True) + y,
    "views": lambda y: y.unflatten(-1, (4, 8)).transpose(1, 2).permute(0, 2, 1, 3).flatten(2)[..., 1:-1],
    "flattened": lambda y: y.reshape(-1, 8).exp().reshape(y.shape),
    "chunks": lambda y: torch.cat([c * i for i, c in enumerate(y.chunk(4, -1))], -1),
    "stack": lambda y: torch.stack([y, y * 2], 2).flatten(2),
    "products": lambda y: y @ W + F.linear(y, W) + torch.matmul(y.unsqueeze(1), W).squeeze(1),
    "topk": lambda y: y.topk(3).values,
    "sort": lambda y: y.sort(-1).values,
    "lookup": lambda y: F.embedding(y.argmax(-1), W) + W[y.argmin(-1)],
    "gather": lambda y: y.gather(-1, y.argsort(-1)),
}
MIXING = {
    "mean": lambda y: y - y.mean(1, keepdim=True),
    "cumsum": lambda y: y.cumsum(1),
    "in place": lambda y: y.mul(2).cumsum_(1),
    "softmax": lambda y: y.softmax(1),
    "sort": lambda y: y.sort(1).values,
    "first": lambda y: y + y[:, :1],
    "flip": lambda y: y.flip(1),
    "roll": lambda y: y.roll(1, 1),
    "shift": lambda y: torch.cat([y[:, 1:], y[:, :1]], 1),
    "product": lambda y: y @ (y.transpose(1, 2) @ y),
    "gather": lambda y: y.gather(1, y.argsort(1)),
    "select": lambda y: y.index_select(1, y[0, :, 0].argsort()),
    "count": lambda y: y / y.shape[1],
    "merge": lambda y: y.transpose(1, 2).reshape(1, -1, wg.HIDDEN),
    "positions": lambda y: y @ torch.ones(wg.HIDDEN, y.shape[1]) @ torch.ones(y.shape[1], wg.HIDDEN),
}


def _captured(function) -> wg.Graph:
    """The function between two collectives, so that it cannot stand behind the join."""

    def model(x: Tensor) -> Tensor:
        return wg.all_reduce(function(wg.all_reduce(x @ W)) * 1.0)

    return wg.Graph(model, wg.tokens(12), 1)


@pytest.mark.parametrize("name", TOKENWISE)
@pytest.mark.parametrize("cut", [1, 5])
def test_tokenwise_operators_are_the_same_in_halves(name, cut):
    with wg.group():
        graph = _captured(TOKENWISE[name])
        split = split_tokens(graph.gm)
        x = graph.arguments(wg.tokens(9))
        (whole,), (halves,) = wg.run_whole(split, x), wg.run_halves(split.gm, x, cut)
        assert split.collectives == 2
        assert not split.joined
        torch.testing.assert_close(halves, whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", MIXING)
def test_operators_that_mix_tokens_are_refused(name):
    with wg.group():
        graph = _captured(MIXING[name])
        before = str(graph.gm.graph)
        with pytest.raises(UnsplittableError, match=r"\w+: |no rule|too large"):
            split_tokens(graph.gm)
        assert str(graph.gm.graph) == before


def test_an_unknown_operator_is_named():
    with wg.group():
        graph = _captured(lambda y: y.cummax(-1).values)
        with pytest.raises(UnsplittableError, match="no rule for cummax"):
            split_tokens(graph.gm)


def test_nothing_to_do_without_a_collective_or_a_symbol():
    with wg.group():
        graph = wg.Graph(lambda x: x @ W, wg.tokens(12), 1)
        with pytest.raises(UnsplittableError, match="no collective"):
            split_tokens(graph.gm)


def test_attention_is_recognised():
    with wg.group():
        graph = wg.Graph(wg.model(1), wg.tokens(12), 1)
        assert sum(is_attention(n) for n in graph.gm.graph.nodes) == 1
