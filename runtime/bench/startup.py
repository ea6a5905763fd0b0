"""From the start of a process to its first token, and the most memory it ever holds.

Every measurement is a fresh `llm42 generate`. Cold means an empty cache folder: kernels are compiled, the
packaged model is unpacked, everything is certified anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from llm42c.errors import ConfigError


@dataclass(frozen=True)
class Start:
    """One process."""

    name: str
    first_token_s: float
    total_s: float
    peak_mb: float

    def as_row(self) -> dict[str, Any]:
        return {
            "start": self.name,
            "first_token_s": round(self.first_token_s, 1),
            "total_s": round(self.total_s, 1),
            "peak_mb": round(self.peak_mb),
        }


def measure_starts(model: str, *, busy_prompts: Sequence[Path] = (), kv_mb: int = 256) -> list[Start]:
    """A cold start, a warm start and, given `busy_prompts`, a warm run of all of them together.

    Raises ConfigError if the process fails.
    """
    with tempfile.TemporaryDirectory() as cache:
        # Inductor keeps its own cache elsewhere.
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        one = ["--max-tokens", "1", "The first token"]
        starts = [_start(name, model, one, kv_mb, environment) for name in ("cold", "warm")]
        if busy_prompts:
            many = [word for path in busy_prompts for word in ("--file", str(path))]
            starts.append(_start("busy", model, ["--max-tokens", "64", *many], kv_mb, environment))
    return starts


def _start(name: str, model: str, arguments: list[str], kv_mb: int, environment: dict[str, str]) -> Start:
    command = [
        sys.executable,
        "-m",
        "llm42c",
        "generate",
        model,
        "--kv-mb",
        str(kv_mb),
        *arguments,
    ]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=environment
        )
        with cast(IO[bytes], process.stdout) as out:
            out.read(1)
            first = time.perf_counter() - start
            out.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait again
        if process.returncode != 0:
            log.seek(0)
            raise ConfigError(f"llm42 generate failed: {log.read().strip()[-400:]}")
    return Start(name, first, time.perf_counter() - start, usage.ru_maxrss / 1024)
