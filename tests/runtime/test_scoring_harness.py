"""What lm-evaluation-harness asks of a model, with stand-ins for its requests and its registry."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_folder

from llm42c import scoring
from llm42c.errors import ConfigError, RequestError
from llm42c.hub import models
from llm42c.runtime.harness import HarnessModel
from llm42c.runtime.loader import BuiltEngine, build_engine
from llm42c.runtime.sampling import SamplingParams


@dataclass
class Instance:
    args: tuple[Any, ...]


def instances(*args: tuple[Any, ...]) -> list[Instance]:
    return [Instance(one) for one in args]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltEngine:
    folder = tiny_folder.save_letters(tmp_path_factory.mktemp("letters"))
    model, tokenizer = models.load_model(str(folder))
    return build_engine(model, tokenizer, num_pages=64)


@pytest.fixture(scope="module")
def lm(built: BuiltEngine) -> HarnessModel:
    return HarnessModel(built=built)


PAIRS = [
    ("What is it?", " A b"),
    ("What is it?", " No."),
    ("", "Hello"),
    ("ends in spaces  ", "x"),
    ("q", ""),
]


def test_loglikelihoods_are_scores_whatever_they_stand_beside(lm: HarnessModel, built: BuiltEngine) -> None:
    found = lm.loglikelihood(instances(*PAIRS))
    assert found == [lm.loglikelihood(instances(pair))[0] for pair in PAIRS]
    assert found == lm.loglikelihood(instances(*PAIRS[::-1]))[::-1]
    ids = built.tokenizer("What is it? A b")["input_ids"]
    assert found[0][0] == built.engine.score(ids[:11], ids[11:]).total
    ids = built.tokenizer("Hello")["input_ids"]
    assert found[2][0] == built.engine.score([1], ids).total  # behind the beginning of a sequence
    ids = built.tokenizer("ends in spaces  x")["input_ids"]
    assert found[3][0] == built.engine.score(ids[:14], ids[14:]).total
    assert found[4] == (0.0, True)


def test_what_is_greedy_is_what_would_be_generated(lm: HarnessModel, built: BuiltEngine) -> None:
    seen = 0
    for prompt in map(chr, range(40, 120)):
        ids = built.tokenizer(prompt)["input_ids"]
        (output,) = built.engine.generate([ids], SamplingParams(max_tokens=5, ignore_eos=True))
        text = built.tokenizer.decode(output.token_ids)
        if built.tokenizer(prompt + text)["input_ids"] != ids + output.token_ids:
            continue  # another spelling of the same text
        other = text[:-1] + ("x" if text[-1] != "x" else "y")
        found = lm.loglikelihood(instances((prompt, text), (prompt, other)))
        assert found[0] == (sum(output.logprobs), True)
        assert not found[1][1]
        seen += 1
    assert seen > 3, "vacuous"


def test_long_texts_are_scored_in_windows_each_token_once(lm: HarnessModel, built: BuiltEngine) -> None:
    assert lm.max_length == 96
    for length in (1, 94, 95, 96, 190, 191, 250):
        tokens = [3 + i * 7 % 90 for i in range(length)]
        windows = list(lm._windows(tokens))
        assert [t for _, some in windows for t in some] == tokens
        assert all(len(before) + len(some) <= 96 for before, some in windows)
        assert windows[0][0] == [1]
        for i, (before, _) in enumerate(windows[1:], start=1):
            assert tokens[95 * i - len(before) : 95 * i] == before
        if length > 96:
            assert len(windows[-1][0]) + len(windows[-1][1]) == 96
    text = "".join(chr(33 + i * 7 % 90) for i in range(150))
    (total,) = lm.loglikelihood_rolling(instances((text,)))
    parts = list(lm._windows(built.tokenizer(text)["input_ids"]))
    assert len(parts) == 2
    assert total == sum(s.total for s in built.engine.score_batch(parts))
    assert lm.loglikelihood_rolling(instances(("",), (text,), ("ab",)))[1] == total


def test_a_context_that_does_not_fit_is_cut_off_at_the_left(lm: HarnessModel) -> None:
    long = "x" * 200
    assert lm.loglikelihood(instances((long, "abc"))) == lm.loglikelihood(instances((long[:120], "abc")))
    with pytest.raises(RequestError, match="does not fit"):
        lm.loglikelihood(instances(("a", long)))


def test_generation_ends_before_the_first_stop(lm: HarnessModel, built: BuiltEngine) -> None:
    (text,) = lm.generate_until(instances(("Go on:", {"max_gen_toks": 30, "until": []})))
    stop = text[7:9]
    asked = [
        ("Go on:", {"max_new_tokens": 30, "until": [stop, "never said"], "do_sample": False}),
        ("Go on:", {"max_gen_toks": 30, "until": stop, "temperature": 0.7, "do_sample": False}),
        ("Go on:", {"max_tokens": 4}),
        ("Go on:", {"max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 4}),
        ("y" * 300, {"max_gen_toks": 12}),
    ]
    found = lm.generate_until(instances(*asked))
    assert found[0] == found[1] == text[: text.index(stop)]
    assert found[2] == text[:4]
    assert found == [lm.generate_until(instances(one))[0] for one in asked]
    with pytest.raises(RequestError, match="does not have: num_beams"):
        lm.generate_until(instances(("a", {"num_beams": 3})))


def test_results_go_to_the_harness_cache(built: BuiltEngine) -> None:
    class Hook:
        taken: list[Any] = []  # noqa: RUF012

        def add_partial(self, *what: Any) -> None:
            self.taken.append(what)

    lm = HarnessModel(built=built)
    lm.cache_hook = Hook()  # type: ignore[attr-defined]
    ((total, greedy),) = lm.loglikelihood(instances(("a", "b")))
    (text,) = lm.generate_until(instances(("a", {"max_gen_toks": 2})))
    assert Hook.taken == [
        ("loglikelihood", ("a", "b"), (total, greedy)),
        ("generate_until", ("a", {"max_gen_toks": 2}), text),
    ]


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the harness's registry."""
    known: dict[str, type] = {}

    class LM:
        def __init__(self) -> None:
            self.rank = 0

    def register_model(name: str) -> Any:
        return lambda made: known.setdefault(name, made)

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.models")}
    modules |= {name: ModuleType(name) for name in ("lm_eval.api.model", "lm_eval.api.registry")}
    modules["lm_eval.api.model"].LM = LM  # type: ignore[attr-defined]
    modules["lm_eval.api.registry"].register_model = register_model  # type: ignore[attr-defined]
    modules["lm_eval.api.registry"].model_registry = known  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    made = scoring.register()
    assert known == {"llm42": made}
    assert issubclass(made, LM)
    assert issubclass(made, HarnessModel)
    assert scoring.register() is made
    with pytest.raises(ConfigError, match="dtype must be"):
        made(dtype="int8")


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ImportError\n")
    command = [sys.executable, "-m", "llm42c.scoring", "--model", "llm42"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tmp_path), "PATH": ""}
    )
    assert done.returncode == 2
    assert done.stderr == "llm42: lm-evaluation-harness is not installed: pip install 'llm42c[lm-eval]'\n"
