"""The command line: what it prints, its exit statuses, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import logging
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
import torch

from llm42c import cli
from llm42c.cli import exits
from llm42c.errors import IntegrityError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder.save(tmp_path_factory.mktemp("tiny")))


def _json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def _generate(capsys: pytest.CaptureFixture[str], model: str, *arguments: str) -> list[dict[str, Any]]:
    status = cli.main(["generate", model, "--json", "--kv-mb", "1", *arguments])
    assert status == 0, capsys.readouterr().err
    return _json_lines(capsys)


def test_generate_alone_equals_together(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["w5 w6 w7", "w9", "w3 w4 w5 w6 w7 w8 w9 w10"]
    way = ["-n", "12", "--ignore-eos", "-t", "0.9", "--top-k", "20", "--seed", "7"]
    together = _generate(capsys, model, *way, *prompts)
    assert [answer["index"] for answer in together] == [0, 1, 2]
    assert len({answer["contract"] for answer in together}) == 1
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = _generate(capsys, model, *way, prompt)
        assert alone["token_ids"] == answer["token_ids"]
        assert len(alone["token_ids"]) == 12
        bits = [struct.pack("<12f", *a["logprobs"]) for a in (alone, answer)]
        assert bits[0] == bits[1]
        assert alone["contract"] == answer["contract"]


def test_prompts_come_from_files_and_stdin(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("w5 w6 w7\n")
    (a,) = _generate(capsys, model, "-n", "4", "w5 w6 w7")
    (b,) = _generate(capsys, model, "-n", "4", "--file", str(tmp_path / "p.txt"))
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6 w7\n"))
    (c,) = _generate(capsys, model, "-n", "4")
    assert a["token_ids"] == b["token_ids"] == c["token_ids"]


def test_one_prompt_is_streamed_as_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (answer,) = _generate(capsys, model, "-n", "6", "w5 w6")
    assert cli.main(["generate", model, "--kv-mb", "1", "-n", "6", "w5 w6"]) == 0
    assert capsys.readouterr().out.strip() == answer["text"].strip()


def test_no_deterministic_runs(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (answer,) = _generate(capsys, model, "--no-deterministic", "-n", "3", "--ignore-eos", "w5")
    assert len(answer["token_ids"]) == 3


def test_demo_agrees_and_writes_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, words in enumerate(("w5 w6 w7", "w9", "w3 w4 w5 w6 w7 w8", "w20 w21")):
        (tmp_path / f"{i}.txt").write_text(words)
    out = tmp_path / "out.json"
    command = ["demo", model, "--prompts", str(tmp_path), "-n", "10", "--control-tokens", "3"]
    assert cli.main([*command, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "every deterministic request agrees bit for bit" in printed
    data = json.loads(out.read_text())
    assert data["agree"] is True
    assert [run["run"] for run in data["runs"]] == ["alone", "together", "pressure"]
    assert data["runs"][0]["logprobs_digest"][:12] in printed
    assert data["control"]["requests"] == 4


def test_demo_fails_where_bits_differ(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm42c.runtime.demo import job

    (tmp_path / "a.txt").write_text("w5 w6 w7")
    monkeypatch.setattr(job, "differing", lambda jobs, a, b: [each.name for each in jobs])
    command = ["demo", model, "--prompts", str(tmp_path), "-n", "2", "--control", "off"]
    assert cli.main(command) == exits.FAILED
    assert "BITS DIFFER" in capsys.readouterr().out


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("options", "state"), [([], "certified by construction"), (["--full"], "certified")])
def test_certify_lists_every_shape(
    options: list[str], state: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shapes.json"
    command = ["certify", model, "--max-tokens", "4", "--json", str(out), *options]
    assert cli.main(command) == 0
    data = json.loads(out.read_text())
    assert {shape["tokens"] for shape in data["shapes"]} == {1, 2, 3, 4}
    assert {shape["state"] for shape in data["shapes"]} == {state}
    assert data["contract"] in capsys.readouterr().out


def test_contract_is_the_same_twice(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = []
    for _ in range(2):
        assert cli.main(["contract", model, "--json"]) == 0
        values.append(_json_lines(capsys)[0])
    assert values[0] == values[1]
    assert len(values[0]["hash"]) == 64
    assert cli.main(["contract", model]) == 0
    assert f"hash {values[0]['hash']}" in capsys.readouterr().out


def test_explain_is_about_the_graph_that_generate_runs(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", model]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("the engine's graph")
    assert "merge_linears fired in:" in printed
    assert "    linear: fma-chain/2 (One fp32 chain" in printed
    assert "compiled by Inductor" in printed
    assert "every call has a fixed order" in printed
    assert "batch shapes are certified by construction" in printed
    assert cli.main(["explain", model, "--pipeline", "compile"]) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("graph 1 of 1")
    assert "dense_attention" in plain
    assert "dense_attention" not in printed


@pytest.mark.parametrize("pipeline", ["engine", "compile"])
def test_explain_with_a_pass_of_another_package(
    pipeline: str, model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "idle_pass.py").write_text(
        "from llm42c.passes.base import Pass\n"
        "def idle(graph, ctx, report):\n    report.miss(next(iter(graph.nodes)), 'it is idle')\n"
        "IDLE = Pass('idle', idle)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["explain", model, "--pipeline", pipeline, "--pass", "idle_pass:IDLE"]) == 0
    printed = capsys.readouterr().out
    assert "added: idle_pass, before check, uuid" in printed
    assert "not 1×: it is idle" in printed


def test_version_and_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    assert cli.main(["version"]) == 0
    assert "torch" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["cache"]) == 0
    assert "empty" in capsys.readouterr().out
    (tmp_path / "llm42" / "models").mkdir(parents=True)
    (tmp_path / "llm42" / "models" / "x").write_bytes(b"x" * 10**6)
    assert cli.main(["cache", "--clear"]) == 0
    assert "1.0 MB  models" in capsys.readouterr().out
    assert list((tmp_path / "llm42").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense"),
        (["generate", "MODEL", "--temprature", "1", "w5"], "temprature"),
        (["generate", "MODEL", "-t", "hot", "w5"], "temperature"),
        (["generate", "MODEL", "-t", "-1", "w5"], "temperature"),
        (["generate", "MODEL", "--top-p", "0.5", "w5"], "no effect at temperature 0"),
        (["generate", "MODEL", "--seed", "-1", "w5"], "seed"),
        (["generate", "MODEL", "-n", "0", "w5"], "max_tokens"),
        (["generate", "MODEL", ""], "a prompt is empty"),
        (["generate", "MODEL", "--file", "/nowhere", "w5"], "/nowhere"),
        (["generate", "/nowhere", "w5"], "no model at '/nowhere'"),
        (["generate", "MODEL", "--fast", "quick", "w5"], "--fast must be one of pinned, stock"),
        (["generate", "MODEL", "--verify", "never", "w5"], "--verify must be one of"),
        (["generate", "MODEL", "--dtype", "int8", "w5"], "--dtype must be one of"),
        (["generate", "MODEL", "--device", "tpu", "w5"], "device must be cpu or cuda, not 'tpu'"),
        pytest.param(
            ["bench", "soak", "--device", "cuda"],
            "device cuda was asked for, and there is no GPU that torch can use",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["generate", "MODEL", "-n", "1000", "w5"], "exceed the context of 96"),
        (["demo", "--prompts", "/nowhere"], "no such folder of prompts"),
        (["demo", "--control", "none"], "--control must be one of"),
        (["demo", "--json", "/nowhere/at/all.json"], "cannot write"),
        (["bench", "--workload", "nonsense"], "no workload 'nonsense'"),
        (["bench", "--requests", "64"], "--requests takes 1 to 32"),
        (["bench", "--deterministic-fraction", "all"], "integers separated by commas"),
        (["bench", "--verify", "auto,never"], "--verify must be one of"),
        (["certify", "./nowhere"], "no model at"),
        (["generate", "Once upon a time"], "prompts come after it: llm42 generate MODEL PROMPT"),
        (["certify"], "Missing argument 'MODEL'. (llm42 certify --help"),
        (["bench", "--model", "smollm2"], "MODEL is an argument"),
        (["bench", "./nowhere"], "no model at './nowhere'"),
        (["bench", "soak", "./nowhere"], "no model at './nowhere'"),
        (["bench", "startup", "./nowhere"], "no model at './nowhere'"),
        (["explain", "MODEL", "--pipeline", "both"], "--pipeline must be one of engine, compile"),
        (["explain", "MODEL", "--pipeline", "engine", "--ranks", "2"], "leave them out"),
        (["explain", "MODEL", "--pass", "nobody:P"], "'nobody:P' of option 'passes' cannot be loaded"),
        (["explain", "no-such-model"], "no folder of that name is here, nothing in Hugging Face's cache"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main([model if a == "MODEL" else a for a in arguments])
    err = capsys.readouterr().err
    assert status == exits.BAD_INPUT
    assert err.startswith("llm42: ")
    assert err.count("\n") == 1
    assert message in err


def test_an_unknown_model_is_answered_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the network hangs: looking up an address heeds no time limit."""
    monkeypatch.setattr("llm42c.hub.lookup._question", lambda name, seconds: time.sleep(60))
    monkeypatch.setattr("llm42c.hub.models.HUB_SECONDS", 0.2)
    import huggingface_hub  # noqa: F401  imported before the clock runs

    start = time.monotonic()
    assert cli.main(["contract", "no-such-org/no-such-model"]) == exits.BAD_INPUT
    assert time.monotonic() - start < 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no folder of that name" in err
    assert "the hub did not answer in 0.2 s" in err


def test_bench_without_a_command_is_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    assert "throughput" in capsys.readouterr().out
    assert cli.main(["bench", "MODEL", "--help"]) == 0
    assert "--workload" in capsys.readouterr().out


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    from llm42c.errors import ModelNotFoundError

    with pytest.raises(ModelNotFoundError):
        cli.main(["--debug", "generate", "/nowhere", "w5"])


def test_no_prompt_at_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    assert cli.main(["generate"]) == exits.BAD_INPUT
    assert "no prompt" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("llm42c.hub.models.load_model", fail)
    assert cli.main(["contract", "smollm2"]) == exits.FAILED
    assert capsys.readouterr().err == "llm42: ZeroDivisionError: oh (llm42 --debug shows where)\n"


def test_what_the_runtime_warns_of_is_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("llm42c.runtime.somewhere")
    with cli.warnings_on_stderr():
        log.info("not worth a line")
        log.warning("cannot write %s", "here")
    log.error("nobody listens")
    assert capsys.readouterr().err == "llm42: cannot write here\n"


def test_a_broken_promise_is_not_a_mistake_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._explain(IntegrityError("the verifier graph\nis not row independent")) == exits.FAILED
    assert capsys.readouterr().err == "llm42: the verifier graph is not row independent\n"
