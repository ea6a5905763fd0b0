"""`llm42 inspect`: kernels of devices that are not here, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm42c import cli
from llm42c.cli import exits
from llm42c.codegen.triton import devices


def test_labels_and_text_need_no_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--no-kernels", "--source", "--target", "gfx942", "--only", "rotary"]) == 0
    printed = capsys.readouterr().out
    assert "gfx942" in printed
    assert "def rotary" in printed


@pytest.mark.slow
def test_resources_of_a_target_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "device.json"
    path.write_text(devices.from_table("NVIDIA H200").to_json())
    assert cli.main(["inspect", "--kernels", "--target", str(path), "--only", "silu_mul"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "silu_mul" in line)
    _, registers, shared, spills, warps = (cell.strip() for cell in row.strip("│ ").split("│"))
    assert int(registers) > 0
    assert (int(shared), int(spills), int(warps)) == (0, 0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_12345"], "no device called 'sm_12345'"),
        (["--target", "/nowhere.json"], "cannot read /nowhere.json"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--head-dim", "72"], "--head-dim must be one of"),
        (["--only", "nonsense"], "in no kernel's label"),
    ],
)
def test_a_mistake_of_inspect_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", *arguments]) == exits.BAD_INPUT
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_a_broken_target_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "device.json"
    path.write_text("{}")
    assert cli.main(["inspect", "--target", str(path)]) == exits.BAD_INPUT
    assert "not the JSON of a device" in capsys.readouterr().err
