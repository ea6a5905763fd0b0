"""`llm42 serve` as a process: it starts, answers, and finishes what it has accepted before it ends."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_folder

from llm42c import cli
from llm42c.cli import exits

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder.save_letters(tmp_path_factory.mktemp("letters")))


@pytest.mark.slow
def test_sigterm_lets_accepted_requests_finish(model: str) -> None:
    options = ["--name", "tiny", "--port", "0", "--kv-mb", "1"]
    command = [sys.executable, "-m", "llm42c", "serve", model, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("tiny at http://127.0.0.1:"), line
        port = int(line.split("/v1")[0].rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 90, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        process.send_signal(signal.SIGTERM)
        text = answer.read().decode()
        assert text.count("data: ") == 90 + 2, "a token, the end, [DONE]"
        assert '"finish_reason": "length"' in text
        assert text.endswith("data: [DONE]\n\n")
        assert process.wait(30) == 0
    finally:
        process.kill()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    start = time.perf_counter()
    assert cli.main(["serve", *arguments]) == exits.BAD_INPUT
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1, printed
    assert time.perf_counter() - start < 20, "it was said only after the model had been loaded"
    return printed


def test_what_cannot_work_is_one_line_at_the_start(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Address already in use" in refusal(capsys, model, "--port", port)
    assert "cannot listen on no.such.host.invalid" in refusal(capsys, model, "--host", "no.such.host.invalid")
    pem = tmp_path / "x.pem"
    pem.write_text("no certificate")
    assert "certificate" in refusal(capsys, model, "--certificate", str(pem), "--key", str(pem))
    assert "together" in refusal(capsys, model, "--certificate", str(pem))
    assert "No such file" in refusal(capsys, model, "--api-keys", str(tmp_path / "none"))
    assert "no API key" in refusal(capsys, model, "--api-keys", str(_empty(tmp_path)))
    assert "timeout_s" in refusal(capsys, model, "--timeout", "0")
    assert str(tmp_path / "nothing") in refusal(capsys, str(tmp_path / "nothing"))


def _empty(folder: Path) -> Path:
    path = folder / "empty"
    path.write_text("\n")
    return path
