"""From MODEL, as the command line takes it, to a running engine; without the model's code where that serves.

The engine is the same either way (``llm42c/compile/standin.py`` says when a note of an earlier start counts);
only ``BuiltEngine.model`` is a stand-in then, which holds the weights and cannot be called.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm42c.compile import standin
from llm42c.device import CPU, prepare_ahead
from llm42c.hub import models
from llm42c.runtime.loader import BuiltEngine, build_engine, eos_token_ids


def open_model(
    name: str | Path,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device = CPU,
    report: Callable[[str, int, int], None] = lambda task, done, total: None,
    **options: Any,
) -> BuiltEngine:
    """Load MODEL in ``dtype`` (default: its own) and build an engine; ``options`` are those of build_engine.

    Raises the errors of :func:`models.load_model` and :func:`build_engine`.
    """
    report("loading", 0, 0)
    prepare_ahead(device)
    serve = standin.untouched() and _notes_serve(device, options)
    around = standin.surroundings(dtype) if serve else ()
    note = _note(name, around) if serve else None
    if note is not None and (model := standin.recall(note, lambda: _loaded(name, dtype)[0])) is not None:
        try:
            tokenizer = _tokenizer(name, note.folder, model.tokenizer)
            report("compiling", 0, 0)
            return build_engine(model, tokenizer, **options)
        except standin.StaleError:
            report("loading", 0, 0)
        del model
    loaded, tokenizer = _loaded(name, dtype)
    report("compiling", 0, 0)
    built = build_engine(loaded, tokenizer, device=device.type, **options)
    note = note or (_note(name, around) if serve else None)  # it may have been unpacked meanwhile
    if note is not None:
        kind = models.class_of_tokenizer(tokenizer, note.folder)
        standin.remember(note, built.compiler, eos_token_ids(loaded), kind)
    return built


def _note(name: str | Path, around: tuple[str, ...]) -> standin.Note | None:
    folder = models.folder_of(name)
    return None if folder is None else standin.note_of(folder, around)


def _loaded(name: str | Path, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    model, tokenizer = models.load_model(name, dtype)
    return model, tokenizer


def _tokenizer(name: str | Path, folder: Path, kind: str | None) -> Any:
    return models.load_tokenizer(name) if kind is None else models.tokenizer_of_class(kind, folder)


def _notes_serve(device: torch.device, options: dict[str, Any]) -> bool:
    """Whether the graph may be a stored one, and the only one that is needed."""
    ranks = options.get("ranks")
    return (
        device == CPU
        and (ranks is None or ranks.size == 1)
        and options.get("fast", "pinned") == "pinned"
        and options.get("token_weave", "off") == "off"
        and not os.environ.get("LLM42_DUMP")
    )
