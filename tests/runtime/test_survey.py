"""The survey finds what it is there to find, survives what it meets, and its committed page is clean."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm42c.errors import ConfigError, UnsupportedModelError
from llm42c.runtime.survey import cells, page, pool, results, tiny
from llm42c.runtime.survey.classes import Decoder, decoders
from llm42c.runtime.survey.mixing import mixing
from llm42c.runtime.survey.pool import Surveyed
from llm42c.runtime.survey.tiny import CannotBuildError, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BY_NAME = {decoder.name: decoder for decoder in decoders()}
# One of each construct: rotary positions, learned ones, ALiBi, experts, attention of the model's own.
QUICK = ("LlamaForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM", "MixtralForCausalLM", "GPTJForCausalLM")


def _tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model_class, config_class = BY_NAME[name].load()
    return tiny_model(model_class, config_class, dtype)


def test_every_class_of_the_mapping_is_listed() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    mapped = {
        n for v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for n in ((v,) if isinstance(v, str) else v)
    }
    assert mapped <= set(BY_NAME)
    assert len(BY_NAME) >= 100


@pytest.mark.parametrize("name", QUICK)
def test_tiny_models_can_show_a_difference(name: str) -> None:
    model = _tiny(name)
    assert model.config.num_hidden_layers >= 2
    assert sum(p.numel() for p in model.parameters()) < 500_000
    cells.require_sane(model)
    again = _tiny(name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not any((p == p.flatten()[0]).all() for p in model.parameters() if p.numel() > 1)


def test_eager_rows_depend_on_their_batch() -> None:
    assert cells.is_revealing(_tiny("LlamaForCausalLM"))


def test_the_kind_of_mixing_is_found_by_dependence() -> None:
    assert mixing(_tiny("LlamaForCausalLM")) == "softmax"
    assert mixing(_tiny("BloomForCausalLM")) == "softmax"
    assert mixing(_tiny("MambaForCausalLM")) == "recurrent or linear"
    assert mixing(_tiny("FalconH1ForCausalLM")) == "hybrid"


def test_a_model_that_ignores_its_past_is_no_evidence() -> None:
    model = _tiny("LlamaForCausalLM")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(ValueError, match="do not depend on the tokens before"):
        cells.require_sane(model)


def test_a_class_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "_MAX_PARAMETERS", 1000)
    with pytest.raises(CannotBuildError, match="smallest known configuration has"):
        _tiny("LlamaForCausalLM")


def test_the_bound_leaves_the_model_as_it_was_and_is_small() -> None:
    model = _tiny("LlamaForCausalLM")
    before = [p.clone() for p in model.parameters()]
    ids = cells.tokens(model, 2, 6)
    bound = cells.rounding_bound(model, lambda: cells.logits(model, ids))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    spread = cells.logits(model, ids).std().item()
    assert 0 < bound < 0.01 * spread  # an answer that is another model's would not pass


@pytest.mark.slow
def test_without_orders_rows_are_wrong() -> None:
    """The control: the same cell, left to Inductor's way, is reported."""
    model = _tiny("LlamaForCausalLM")
    work = lambda: cells.check_compile(model, model, {"reductions": "free"}, inductor=False)  # noqa: E731
    state, told = cells.judge(work)
    assert state == "wrong"
    assert "other bits" in told


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "state"), [(torch.bfloat16, "ok"), (torch.float32, "wrong")])
def test_only_fp32_models_are_held_to_the_rounding_of_fp32(dtype: torch.dtype, state: str) -> None:
    """A model in bf16 may give its logits in fp32; rounding to bf16 on the way is not an error then."""

    class Fp32Logits(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input.bfloat16().to(self.weight.dtype)).float()

    eager, model = _tiny("LlamaForCausalLM"), _tiny("LlamaForCausalLM", dtype)
    head = Fp32Logits(*reversed(model.lm_head.weight.shape), bias=False, dtype=dtype)
    head.weight = model.lm_head.weight
    model.lm_head = head
    found, told = cells.judge(lambda: cells.check_compile(model, eager, inductor=False))
    assert found == state, told


@pytest.mark.slow
def test_a_quick_subset_and_an_unknown_class() -> None:
    asked = [*(BY_NAME[n] for n in QUICK), Decoder("NoSuchForCausalLM", "none")]
    found = pool.survey(asked, [("float32", "compile")], workers=1, inductor=False)
    unknown = found.pop()
    assert unknown.unbuilt
    assert not unknown.cells
    assert [one.name for one in found] == sorted(QUICK)
    assert all(cell.state == "ok" for one in found for cell in one.cells), [page.line(one) for one in found]
    assert page.share_revealing(found) >= page.MIN_REVEALING


@pytest.mark.slow
def test_both_paths_as_users_call_them() -> None:
    eager = _tiny("LlamaForCausalLM")
    for path in (cells.check_compile, cells.check_generate):
        torch._dynamo.reset()
        assert cells.judge(lambda: path(_tiny("LlamaForCausalLM"), eager)) == ("ok", "")  # noqa: B023


def _raising(error: Exception) -> Any:
    def work() -> None:
        raise error

    return work


def test_what_counts_as_a_refusal() -> None:
    assert cells.judge(_raising(UnsupportedModelError("no such thing"))) == ("refused", "no such thing")
    assert cells.judge(_raising(UnsupportedModelError("two\nlines")))[0] == "crash"
    assert cells.judge(_raising(RuntimeError("oh")))[0] == "crash"
    wrapped = RuntimeError("backend failed")
    wrapped.__cause__ = UnsupportedModelError("inside")
    assert cells.judge(_raising(wrapped)) == ("refused", "inside")


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps({"built": True, "mixing": "softmax"}), flush=True)
    for dtype, path in job["cells"]:
        if job["name"] == "Dies" and dtype == "bfloat16":
            os.abort()
        if job["name"] == "Hangs" and dtype == "float32":
            time.sleep(60)
        print(json.dumps({"state": "ok", "told": "", "seconds": 0.0, "revealing": True}), flush=True)
    print(json.dumps({"done": True, "full": False}), flush=True)
"""


def test_a_crash_and_a_hang_are_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(pool, "_COMMAND", [sys.executable, str(script)])
    names = ["Dies", "Fine", "Hangs"]
    wanted = [("float32", "compile"), ("bfloat16", "compile"), ("bfloat16", "generate")]
    found = pool.survey([Decoder(n, "") for n in names], wanted, workers=1, limit=2)
    states = {one.name: [cell.state for cell in one.cells] for one in found}
    assert states == {
        "Dies": ["ok", "crash", "crash"],
        "Fine": ["ok", "ok", "ok"],
        "Hangs": ["slow", "ok", "ok"],
    }
    assert "SIGABRT" in found[0].cells[1].told


def test_known_cells_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A survey goes on where another ended, in the order of the cells that are wanted."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(pool, "_COMMAND", [sys.executable, str(script)])
    refused = cells.Cell("Hangs", "float32", "compile", "refused", "it hangs")
    file = tmp_path / "before.json"
    before = [Surveyed("Hangs", "softmax", cells=[refused]), Surveyed("Dies", unbuilt="it is large")]
    file.write_text(json.dumps(results.data(before, "transformers 0")))
    known = results.read([file], "transformers 0")
    wanted = [("float32", "compile"), ("bfloat16", "compile")]
    found = pool.survey([Decoder(n, "") for n in ("Dies", "Hangs")], wanted, workers=1, limit=2, known=known)
    assert [(one.name, one.unbuilt, [c.state for c in one.cells]) for one in found] == [
        ("Dies", "it is large", []),
        ("Hangs", "", ["refused", "ok"]),
    ]
    assert [(c.dtype, c.path) for c in found[1].cells] == wanted


def test_files_of_other_versions_and_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    file.write_text(json.dumps(results.data([], "transformers 0")))
    with pytest.raises(ConfigError, match="is of transformers 0; this is transformers 1"):
        results.read([file], "transformers 1")
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="is not what llm42 survey --json writes"):
        results.read([file], "transformers 1")


def test_a_page_says_what_was_found() -> None:
    wanted = [("float32", "compile"), ("float32", "generate")]
    refused = cells.Cell("B", "float32", "generate", "refused", "B is not supported: it is odd")
    found = [
        Surveyed("A", "softmax", cells=[cells.Cell("A", "float32", p, "ok") for _, p in wanted]),
        Surveyed("B", "hybrid", cells=[cells.Cell("B", "float32", "compile", "wrong", "rows"), refused]),
        Surveyed("C", unbuilt="it is large"),
    ]
    text = page.page(found, wanted, "transformers 0", 9)
    assert page.states(text) == {"A": ["ok", "ok"], "B": ["wrong", "refused"]}
    assert "it is odd" in text
    assert "`C`: it is large" in text
    assert [cell.name for cell in page.bad_cells(found)] == ["B"]


@pytest.mark.parametrize(("path", "least"), [("torch.compile", 0.85), ("generate", 0.75)])
def test_most_decoders_with_softmax_attention_are_served(path: str, least: float) -> None:
    ok, of = re.findall(rf"^- softmax: .*`{path}` (\d+) of (\d+)", PAGE.read_text(), re.MULTILINE)[0]
    assert int(of) >= 60
    assert int(ok) >= least * int(of)


def test_the_committed_page_is_clean() -> None:
    found = page.states(PAGE.read_text())
    assert found
    assert {state for states in found.values() for state in states} <= {"ok", "refused"}
