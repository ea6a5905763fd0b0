"""`llm42 doctor` on machines that lack things."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from llm42c.cli import doctor
from llm42c.cli.app import app
from llm42c.codegen import cache
from llm42c.codegen.cpu import build


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, result.output


def finding(subject: str) -> doctor.Finding:
    return next(f for f in doctor.findings() if f.subject == subject)


def test_this_machine_is_well() -> None:
    code, text = run("--json")
    found = {f["subject"]: f for f in json.loads(text)}
    assert code == 0
    assert {"torch", "transformers", "[gguf]", "CPU", "kernels", "GPU", "cache", "memory"} <= found.keys()
    assert found["torch"]["verdict"] == "ok"
    assert "[dev]" not in found


def test_the_table_shows_extras_and_verdicts_without_colours() -> None:
    code, text = run()
    assert code == 0
    assert "[sign]" in text
    assert "ok" in text


def test_no_compiler_and_no_wheel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "carried", lambda isa: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert finding("kernels").verdict == "wrong"
    assert run()[0] == 1


def test_versions_outside_of_the_range_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "llguidance":
            raise importlib.metadata.PackageNotFoundError(name)
        return "99.0" if name == "transformers" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    old, missing = finding("transformers"), finding("[structured]")
    assert (old.verdict, missing.verdict) == ("note", "note")
    assert "99.0 was not tested" in old.found
    assert Requirement(old.mend.removeprefix("pip install '").removesuffix("'")).name == "transformers"
    assert missing.mend == "pip install 'llm42c[structured]'"


def test_what_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = " ".join(build.NEEDS["avx512_bf16"])
    monkeypatch.setattr(build, "cpu_features", lambda: f"x86_64 {flags} amx_bf16")
    monkeypatch.delenv(build.ISA_VARIABLE, raising=False)
    assert finding("CPU").found.startswith("avx512_bf16")
    assert "two_chains" in finding("AMX").mend
    monkeypatch.setattr(build, "cpu_features", lambda: "x86_64 sse2")
    monkeypatch.setenv(build.ISA_VARIABLE, "avx2")
    subjects = {f.subject: f for f in doctor.cpu()}
    assert subjects["vectors"].verdict == "note"
    assert "AMX" not in subjects
    assert subjects[build.ISA_VARIABLE].mend == f"unset {build.ISA_VARIABLE}"


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "obstacle", lambda: "No space left on device")
    assert finding("cache").found == "cannot be written: No space left on device"
