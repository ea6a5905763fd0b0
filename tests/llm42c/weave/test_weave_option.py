"""``options={"token_weave": …}``: woven where asked for, unchanged where not, and what ``explain`` says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import weave_graphs as wg
from torch import Tensor, nn

import llm42c
from llm42c.codegen.device import Device, Value
from llm42c.errors import OptionsError, UnsupportedModelError
from llm42c.options import Options
from llm42c.weave import option as weave_option


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    torch._dynamo.reset()
    with wg.group(), torch.no_grad():
        yield


def rates(folder: Path, **changes: float) -> str:
    """A file with the rates of a device on which communication is a large part of a layer."""
    numbers = {"fp32_flops": 1e11, "memory_bandwidth": 1e11, "link_latency": 1e-7, "link_bandwidth": 3e8}
    numbers["call_seconds"] = 1e-9
    values = {n: Value(v, "test") for n, v in (numbers | changes).items() if v}
    path = folder / "target.json"
    path.write_text(Device("cpu", "test", "x86_64", values).to_json())
    return str(path)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="llm42", fullgraph=True, options=options)


def marked(count: int) -> Tensor:
    x = wg.tokens(count)
    torch._dynamo.mark_dynamic(x, 1)
    return x


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The woven programs that the option has made."""
    programs: list[Any] = []
    build = weave_option.compile_woven

    def kept(*args: Any, **kwargs: Any) -> Any:
        programs.append(build(*args, **kwargs))
        return programs[-1]

    monkeypatch.setattr(weave_option, "compile_woven", kept)
    return programs


@pytest.mark.slow
def test_the_option_weaves_and_changes_no_bit(tmp_path: Path, made: list[Any]):
    model = wg.model(1)
    plain = compiled(model)
    expected = {n: plain(marked(n) if n == 40 else wg.tokens(n)) for n in (40, 3, 7)}
    assert not made
    torch._dynamo.reset()
    woven = compiled(model, token_weave="always", target=rates(tmp_path), dump=str(tmp_path / "dump"))
    for n, want in expected.items():
        assert torch.equal(bits(woven(marked(n) if n == 40 else wg.tokens(n))), bits(want))
    assert made[0].calls == {"woven": 3, "whole": 0}
    (folder,) = (tmp_path / "dump").iterdir()
    assert "woven" in (folder / "token_weave.txt").read_text()
    assert (folder / "token_weave.dot").read_text().startswith("digraph")


class Masked(nn.Module):
    """A mask of every sequence, so that a value has three symbolic sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(wg.HIDDEN, 3 * wg.HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        place = torch.arange(x.shape[1])
        mask = (place <= place[:, None]).expand(x.shape[0], 1, -1, -1)
        a = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return x + wg.all_reduce(a.transpose(1, 2).flatten(2))


def test_batches_of_any_size_with_a_mask_each(tmp_path: Path, made: list[Any]):
    torch.manual_seed(0)
    model, batches = Masked(), [wg.tokens(count, batch) for batch, count in ((3, 12), (2, 7), (3, 5))]
    plain = torch.compile(model, backend="llm42", fullgraph=True, dynamic=True)
    expected = [plain(x) for x in batches]
    torch._dynamo.reset()
    options = {"token_weave": "always", "target": rates(tmp_path)}
    woven = torch.compile(model, backend="llm42", fullgraph=True, dynamic=True, options=options)
    for x, want in zip(batches, expected, strict=True):
        assert torch.equal(bits(woven(x)), bits(want))
    assert [program.calls["woven"] for program in made] == [2, 1]  # one for each size of the batch


def test_auto_leaves_a_graph_alone_that_cannot_be_divided(caplog: pytest.LogCaptureFixture):
    """No collective at all: the graph never leaves the ordinary way."""
    layer = nn.Linear(8, 8)
    with caplog.at_level("INFO", logger="llm42c.weave.option"):
        compiled(layer, token_weave="auto")(torch.randn(3, 8))
    assert "not divided among ranks" in caplog.text


def mixing(x: Tensor) -> Tensor:
    return wg.all_reduce((x @ x.new_ones(wg.HIDDEN, wg.HIDDEN)).softmax(1)) + x


@pytest.mark.parametrize(
    ("model", "dynamic", "reason"),
    [
        (nn.Linear(wg.HIDDEN, 4), True, "the model is not divided among ranks"),
        (wg.model(1), False, "mark_dynamic"),
        (mixing, True, "mixes rows of different tokens"),
    ],
)
def test_what_is_demanded_and_impossible_is_an_error(model: Any, dynamic: bool, reason: str, tmp_path: Path):
    x = marked(6) if dynamic else wg.tokens(6)
    with pytest.raises(Exception, match=reason) as caught:
        compiled(model, token_weave="always", target=rates(tmp_path))(x)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), UnsupportedModelError)


def test_explain_prints_the_plan_and_draws_it(tmp_path: Path):
    options = {"token_weave": "auto", "target": rates(tmp_path)}
    found = llm42c.explain(wg.model(3), wg.tokens(12), options)
    page = str(found)
    assert "6 of 6 collectives divided" in page
    assert "microseconds of n tokens" in page  # the costs, as expressions in n
    assert "*n" in page
    assert "critical path" in page
    assert "woven: saves" in page
    assert "whole: there is nothing to divide" in page  # one token
    for name, beginning in (("plan.dot", "digraph"), ("plan.mmd", "flowchart")):
        found.draw(tmp_path / name)
        assert (tmp_path / name).read_text().startswith(beginning)
    with pytest.raises(OptionsError, match=r"\.dot or \.mmd"):
        found.draw(tmp_path / "plan.png")


def test_explain_says_why_not(tmp_path: Path):
    """A link that costs latency only: more collectives are worse, and the model declines."""
    target = rates(tmp_path, link_latency=1e-2, link_bandwidth=1e15)
    page = str(llm42c.explain(wg.model(1), wg.tokens(12), {"token_weave": "auto", "target": target}))
    assert "whole: weaving costs" in page
    assert "woven: saves" not in page
    found = llm42c.explain(nn.Linear(wg.HIDDEN, 4), wg.tokens(12), {"token_weave": "auto"})
    assert "not woven: the graph has no all-reduce" in str(found)
    with pytest.raises(OptionsError, match="no plan to draw: the graph has no all-reduce"):
        found.draw(tmp_path / "plan.dot")
    assert "token weaving" not in str(llm42c.explain(nn.Linear(wg.HIDDEN, 4), wg.tokens(12)))


def test_a_target_without_the_rates_of_a_link(tmp_path: Path):
    assert weave_option.read_target(None) is None
    with pytest.raises(Exception, match="link_bandwidth"):
        compiled(wg.model(1), token_weave="auto", target=rates(tmp_path, link_bandwidth=0))(marked(6))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(OptionsError, match="not the JSON of a device"):
        weave_option.read_target(str(tmp_path / "other.json"))
    with pytest.raises(OptionsError, match="option 'target'"):
        weave_option.read_target(str(tmp_path / "missing.json"))


def test_nothing_to_measure_with_declines():
    """A group that only exists in name, and no target."""
    found = llm42c.explain(wg.model(1), wg.tokens(12), {"token_weave": "auto"})
    assert "no ranks to measure the link with" in str(found)


def test_shards_need_something_to_divide():
    with pytest.raises(Exception, match="no fused all-reduce") as caught:
        compiled(nn.Linear(wg.HIDDEN, 4), residual_shards=True)(wg.tokens(3))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), UnsupportedModelError)
    with pytest.raises(OptionsError, match="needs reductions='fixed'"):
        Options.parse({"residual_shards": True, "reductions": "free"})
