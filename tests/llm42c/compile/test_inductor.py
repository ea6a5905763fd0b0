"""Inductor's settings: what this torch does not know is said, and warned of where bits hang on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llm42c
from llm42c.compile import inductor


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """A torch that lacks a setting of ours."""

    def lack(name: str) -> None:
        monkeypatch.setitem(inductor._FIXED, name, 1)
        inductor._warn_once.cache_clear()

    yield lack
    inductor._warn_once.cache_clear()


def page() -> str:
    return str(llm42c.explain(nn.Linear(4, 4), torch.randn(3, 4)))


def test_this_torch_has_what_bits_hang_on():
    assert inductor.fixed_config().keys() >= inductor.REQUIRED
    assert not inductor.REQUIRED.intersection(inductor.unknown_settings())


def test_a_setting_that_is_not_needed_shows_in_explain(without, caplog: pytest.LogCaptureFixture):
    assert "no_such_setting" not in page()
    without("no_such_setting")
    assert inductor.unknown_settings()[-1] == "no_such_setting"
    assert "no setting no_such_setting: no placed call needs it" in page()
    assert "no_such_setting" not in inductor.fixed_config()
    inductor._warn_once()
    assert "no_such_setting" not in caplog.text


def test_a_setting_that_bits_hang_on_is_warned_of_once(
    without, monkeypatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(inductor, "REQUIRED", inductor.REQUIRED | {"no_such_setting"})
    without("no_such_setting")
    assert "no setting no_such_setting: bits of what it compiles may depend on the batch" in page()
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(nn.Linear(4, 4), backend="llm42")(torch.randn(3, 4))
    said = [r.getMessage() for r in caplog.records if "no_such_setting" in r.getMessage()]
    assert len(said) == 1
