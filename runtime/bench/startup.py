"""From the start of a process to its first token, and the most memory it ever holds.

Every measurement is a fresh process: `llm42 generate`, but for the demo. Cold means an empty cache folder:
kernels are compiled, the packaged model is unpacked, everything is certified anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zipfile
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


def measure_starts(
    model: str,
    *,
    busy_prompts: Sequence[Path] = (),
    kv_mb: int = 256,
    wheel: Path | None = None,
    demo: bool = False,
) -> list[Start]:
    """A cold start and a warm one and, given `busy_prompts`, a warm run of all of them together.

    `wheel`: two more starts, from this wheel and without a compiler. `demo`: then `llm42 demo`, warm.
    Raises ConfigError if a process fails, or for a wheel that cannot be read.
    """
    if os.path.exists(model):
        model = os.path.abspath(model)  # processes run elsewhere
    one = ["generate", model, "--kv-mb", str(kv_mb), "--max-tokens", "1", "The first token"]
    with tempfile.TemporaryDirectory() as cache:
        environment = _with_cache(cache)
        starts = [_start(name, one, environment) for name in ("cold", "warm")]
        if busy_prompts:
            many = [word for path in busy_prompts for word in ("--file", str(path))]
            busy = ["generate", model, "--kv-mb", str(kv_mb), "--max-tokens", "64", *many]
            starts.append(_start("busy", busy, environment))
        if demo:
            starts.append(_start("demo", ["demo", model], environment))
    if wheel is not None:
        starts += _from_wheel(wheel, one)
    return starts


def _from_wheel(wheel: Path, arguments: list[str]) -> list[Start]:
    """As it is where the wheel is installed and there is no compiler: no program is on the path."""
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as package:
        try:
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(package)
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigError(f"cannot read the wheel {wheel}: {error}") from None
        without = {name: value for name, value in _with_cache(cache).items() if name != "CXX"}
        environment = {**without, "PYTHONPATH": package, "PATH": str(Path(package) / "nothing")}
        return [
            _start(name, arguments, environment, package)
            for name in ("cold, wheel without compiler", "warm, wheel without compiler")
        ]


def _with_cache(folder: str) -> dict[str, str]:
    # Inductor keeps its own cache elsewhere.
    return {**os.environ, "XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}


def _start(name: str, arguments: list[str], environment: dict[str, str], folder: str | None = None) -> Start:
    """``folder``: where the process runs; Python looks for packages there first."""
    command = [sys.executable, "-m", "llm42c", *arguments]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            cwd=folder,
        )
        with cast(IO[bytes], process.stdout) as out:
            out.read(1)
            first = time.perf_counter() - start
            out.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait again
        if process.returncode != 0:
            log.seek(0)
            raise ConfigError(f"llm42 {arguments[0]} failed: {log.read().strip()[-400:]}")
    return Start(name, first, time.perf_counter() - start, usage.ru_maxrss / 1024)
