"""Processes that are measured in turns: whoever is not measured stands still."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm42c.errors import ConfigError


class Held:
    """A process and all that it starts, which can be stopped and continued with a signal.

    Raises ConfigError when the program cannot be run.
    """

    def __init__(
        self, what: str, command: Sequence[str | Path], environment: Mapping[str, str], **pipes: Any
    ) -> None:
        self.what = what
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        try:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                **{"stdin": subprocess.DEVNULL, "stdout": self._log, "stderr": self._log, **pipes},
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"cannot run {command[0]}: {error.strerror}") from None

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)  # its idle threads may spin

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def ended(self) -> ConfigError:
        """The error of a process that has ended too early, with the last line that it wrote."""
        self.process.wait()
        self._log.seek(0)
        last = [text for text in self._log.read().splitlines() if text.strip()][-1:]
        return ConfigError(f"{self.what} ended: {''.join(last) or 'no output'}")

    def close(self, end: int = signal.SIGTERM, seconds: float = 30.0) -> None:
        """End it, with `end` first, and all that it started."""
        self.resume()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        self.process.send_signal(end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self._signal(signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
