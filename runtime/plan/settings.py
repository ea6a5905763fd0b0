"""What an engine takes of a plan's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm42c.errors import ConfigError

VERSION = 1
ENGINE = ("kv_cache_bytes", "max_num_seqs", "max_num_batched_tokens", "speculate")
"""The fields of EngineConfig that a plan decides. None of them is part of the contract."""


def settings(path: str | Path, model: str | None = None) -> dict[str, Any]:
    """Fields of EngineConfig from a file that ``llm42 plan --out`` wrote.

    Raises ConfigError for another file, and for a plan of another model than ``model``.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        version, found, planned = raw["version"], dict(raw["engine"]), raw["needs"]["model"]
    except OSError as error:
        raise ConfigError(f"cannot read the plan {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is no plan: llm42 plan MODEL --out {path} writes one") from None
    if version != VERSION:
        raise ConfigError(f"{path} is a plan of another release: make it anew with llm42 plan --out")
    if unknown := sorted(found.keys() - set(ENGINE)):
        raise ConfigError(f"{path}: a plan does not decide {unknown[0]}")
    if model is not None and planned != model:
        raise ConfigError(f"{path} is a plan for {planned}, not for {model}")
    return {name: None if value == "off" and name == "speculate" else value for name, value in found.items()}
