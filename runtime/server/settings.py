"""What an operator may set. Nothing here changes a bit of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm42c.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Raises ConfigError from the constructor when a value cannot work."""

    model: str  # the name that requests give
    deterministic: bool = True  # what a request is that does not say
    max_queue: int = 256  # requests that may wait besides those that the engine runs at once
    max_choices: int = 128  # of one request: prompts times n
    max_body_bytes: int = 2 * 2**20
    timeout_s: float = 600.0  # from arrival to the last token; a request may ask for less
    write_timeout_s: float = 30.0  # that a client may take none of what is sent to it
    max_connections: int | None = None  # None: what the limit of open files leaves
    drain_s: float = 30.0  # that accepted requests may take after SIGTERM
    api_keys: tuple[str, ...] = ()  # none: everybody may ask
    remembered_tokens: int = 2**20  # of abandoned deterministic outputs, kept as drafts
    cache_path: Path | None = None  # of exact answers; None: none are kept
    cache_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_queue", "remembered_tokens"):
            self._at_least(name, 0)
        for name in ("max_choices", "max_body_bytes", "cache_bytes"):
            self._at_least(name, 1)
        if self.max_connections is not None:
            self._at_least("max_connections", 1)
        for name in ("timeout_s", "write_timeout_s", "drain_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a positive number of seconds, not {getattr(self, name)!r}")
        if any(not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise ConfigError("an API key must be printable ASCII without spaces")

    def _at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name} must be an integer >= {low}, not {value!r}")
