"""Among equal scores the choice does not depend on the batch; not on a CPU, the lower index wins."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits

from llm42c.passes import topk as topk_pass
from llm42c.passes.topk import topk

G = torch.Generator().manual_seed(3)
TIES = torch.randint(0, 4, (33, 50), generator=G).float()  # each value about twelve times
DISTINCT = torch.randn(33, 50, generator=G)


def _lowest_first(x: torch.Tensor, k: int, largest: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    order = [
        sorted(range(len(row)), key=lambda i: (-row[i] if largest else row[i], i))[:k] for row in x.tolist()
    ]
    indices = torch.tensor(order)
    return x.gather(-1, indices), indices


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose library does not look at the row alone."""
    monkeypatch.setattr(topk_pass, "_row_decides", lambda device: False)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("fn", "largest"),
    [
        (lambda x: torch.topk(x, 5), True),
        (lambda x: tuple(x.topk(k=5, dim=-1, sorted=False)), True),
        (lambda x: (x.topk(5).values, x.topk(5).indices), True),
        (lambda x: torch.topk(x, 5, largest=False), False),
        (lambda x: tuple(t.t() for t in torch.topk(x.t(), 5, 0)), True),
        (lambda x: tuple(t.view(-1).view(-1, 5) for t in torch.topk(x, 5)), True),
    ],
)
def test_topk(fn, largest, dynamic):
    gm = capture(fn, TIES, dynamic=dynamic)
    report = apply(gm, topk)
    assert report.matches
    assert not report.misses
    assert "topk" not in calls(gm)
    values, indices = run(gm)
    want = _lowest_first(TIES, 5, largest)
    assert same_bits(values, want[0])
    assert torch.equal(indices, want[1])


def test_the_library_takes_another_one():
    """The control: the scores do have ties that torch breaks in another way."""
    assert not torch.equal(torch.topk(TIES, 5).indices, _lowest_first(TIES, 5)[1])


@pytest.mark.parametrize(("size", "k"), [(8, 2), (64, 8), (256, 8), (300, 200), (1000, 10)])
def test_on_a_cpu_a_row_decides(size, k):
    """torch's choice among equals does not move with the row's place or the number of rows."""
    x = torch.randint(0, 3, (513, size), generator=G).float()
    whole, order = torch.topk(x, k).indices, torch.randperm(513, generator=G)
    assert torch.equal(torch.topk(x[order], k).indices, whole[order])
    for i in range(0, 513, 64):
        assert torch.equal(torch.topk(x[i : i + 1], k).indices[0], whole[i])
    assert not torch.equal(whole, _lowest_first(x, k)[1])  # there are ties
    gm = capture(lambda x: torch.topk(x, k).indices, x)
    assert not apply(gm, topk).matches


@pytest.mark.usefixtures("elsewhere")
def test_without_ties_nothing_changes():
    gm = capture(lambda x: torch.topk(x, 7), DISTINCT)
    apply(gm, topk)
    for got, want in zip(run(gm), torch.topk(DISTINCT, 7), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.sort(x, descending=True)[1],
        lambda x: torch.argsort(x, -1, True),
        lambda x: x.argsort(descending=True),
        lambda x: x.sort(dim=1, descending=True).indices,
    ],
)
def test_sorts_become_stable(fn):
    gm = capture(fn, TIES)
    assert len(apply(gm, topk).matches) == 1
    (node,) = [n for n in gm.graph.nodes if "stable" in n.kwargs]
    assert node.kwargs["stable"] is True
    assert torch.equal(run(gm), torch.sort(TIES, descending=True, stable=True)[1])


def test_stable_sorts_are_left_alone():
    gm = capture(lambda x: torch.sort(x, stable=True)[0], TIES)
    assert not apply(gm, topk).matches


@pytest.mark.usefixtures("elsewhere")
def test_gradients_go_to_the_chosen():
    gm = capture(lambda x: torch.topk(x, 3).values, DISTINCT)
    apply(gm, topk)
    x = DISTINCT.clone().requires_grad_()
    gm(x)[0].sum().backward()
    want = torch.zeros_like(DISTINCT).scatter_(1, torch.topk(DISTINCT, 3).indices, 1.0)
    assert torch.equal(x.grad, want)
