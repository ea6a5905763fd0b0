"""The harness: turns, ratios, counting what differs, the peer behind its pipe, and the CSV."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llm42c.errors import ConfigError
from llm42c.runtime.bench import contenders, harness
from llm42c.runtime.bench.contenders import Sample, llama_cpp, spread, vllm_cpu
from llm42c.runtime.bench.startup import measure_starts

FAKE_PEER = Path(__file__).parent / "fake_peer"


class Scripted:
    """Takes `seconds[i]` in its i-th measured round; `odd` gives other tokens when alone."""

    def __init__(self, name: str, seconds: list[float], log: list[str], odd: bool = False) -> None:
        self.name, self.seconds, self.log, self.odd = name, list(seconds), log, odd
        self.rounds = 0

    def run(self, prompts: Any, new_tokens: int) -> Sample:
        self.log.append(self.name)
        self.rounds += 1
        first = 1 if self.odd and len(prompts) == 1 else 0
        tokens = [[first] * new_tokens for _ in prompts]
        return Sample(tokens, self.seconds.pop(0) if self.seconds else 1.0)

    def warm_up(self, prompts: Any, new_tokens: int) -> None:
        self.log.append(f"warm {self.name}")
        self.rounds += 10

    def counters(self) -> dict[str, Any]:
        return {"rollbacks": self.rounds}


def _quiet(name: str, done: int, total: int) -> None:
    pass


def test_engines_take_turns_and_ratios_are_of_neighbours() -> None:
    log: list[str] = []
    a, b = Scripted("a", [1.0, 2.0, 4.0], log), Scripted("b", [2.0, 2.0, 8.0], log)
    first, second = harness.measure([a, b], harness.Case("decode", 4), 3, _quiet)
    assert log == ["warm a", "warm b", *"abbaab"]
    assert first.rates == [512.0, 256.0, 128.0]
    assert (first.median, first.lead) == (256.0, 1.0)
    assert second.lead == 2.0
    assert first.counters == {"rollbacks": 3}
    assert first.differ is None


def test_what_differs_between_alone_and_together_is_counted() -> None:
    contestants = [Scripted("steady", [], []), Scripted("odd", [], [], odd=True)]
    steady, odd = harness.measure(contestants, harness.Case("mixed", 8), 1, _quiet)
    assert (steady.differ, odd.differ) == (0, 8)


def test_cases() -> None:
    assert len(harness.cases([])) == 7
    assert harness.cases(["long"], [1, 2]) == [harness.Case("long", 1), harness.Case("long", 2)]
    with pytest.raises(ConfigError, match="no workload 'nonsense'"):
        harness.cases(["nonsense"])
    with pytest.raises(ConfigError, match="1 to 32"):
        harness.cases(["long"], [64])


@pytest.mark.parametrize(("percent", "expected"), [(0, 0), (1, 0), (25, 8), (50, 16), (75, 24), (100, 32)])
def test_fractions_are_spread(percent: int, expected: int) -> None:
    chosen = [spread(i, percent) for i in range(32)]
    assert sum(chosen) == expected
    assert all(abs(sum(chosen[:n]) - n * percent / 100) < 1 for n in range(33))


def test_csv_holds_the_command_and_the_machine(tmp_path: Path) -> None:
    results = harness.measure([Scripted("a", [1.0], [])], harness.Case("decode", 1), 1, _quiet)
    path = tmp_path / "new" / "x.csv"
    harness.write_csv(path, [r.as_row() for r in results], command="llm42 bench", cpu="a cpu")
    (row,) = list(csv.DictReader(path.open()))
    assert (row["workload"], row["median_tok_s"], row["command"]) == ("decode", "128.0", "llm42 bench")
    with pytest.raises(ConfigError, match="cannot write"):
        harness.write_csv(path / "under a file.csv", [r.as_row() for r in results])


def test_the_peer_answers_through_its_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE_PEER))
    peer = vllm_cpu(Path(sys.executable), Path("some-model"))
    try:
        assert peer.name == "vllm-cpu 0.0-fake"
        for n in (1, 3):
            sample = peer.run([[4, i] for i in range(n)], 5)
            assert sample.tokens == [[i] * 5 for i in range(n)]
            assert sample.seconds > 0
    finally:
        peer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(peer._held.process.pid, 0)


def test_a_peer_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot run"):
        vllm_cpu(tmp_path / "python", Path("some-model"))
    monkeypatch.setenv("PYTHONPATH", str(FAKE_PEER))
    with pytest.raises(ConfigError, match="no such model"):
        vllm_cpu(Path(sys.executable), Path("broken"))


def test_llama_cpp_prefills_in_parts_and_decodes_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE_PEER))
    file, broken = tmp_path / "some.gguf", tmp_path / "broken.gguf"
    for each in (file, broken):
        each.touch()
    peer = llama_cpp(Path(sys.executable), file)
    try:
        assert peer.name == "llama.cpp some 0.0-fake"
        sample = peer.run([[5] * 600, [1, 2], [7]], 3)
        assert sample.tokens == [[6, 7, 8], [3, 4, 5], [8, 9, 10]]
    finally:
        peer.close()
    with pytest.raises(ConfigError, match=r"llama\.cpp cannot load"):
        llama_cpp(Path(sys.executable), broken)
    with pytest.raises(ConfigError, match="no such GGUF file"):
        llama_cpp(Path(sys.executable), tmp_path / "absent.gguf")


@pytest.mark.parametrize("worker", ["worker_vllm.py", "worker_llamacpp.py"])
def test_the_worker_needs_nothing_of_ours(worker: str) -> None:
    text = Path(contenders.__file__).with_name(worker).read_text()
    assert "import llm42c" not in text
    assert "from llm42c" not in text


def test_a_failing_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        measure_starts(str(tmp_path))
