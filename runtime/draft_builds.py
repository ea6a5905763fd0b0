"""Draft models compiled for the engines of one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llm42c.compile.compiler import ModelCompiler
from llm42c.compile.standin import StandIn
from llm42c.errors import ConfigError
from llm42c.hub import models
from llm42c.hub.quantise import quantised_copy
from llm42c.runtime.draft_models import BuiltDraft, require_vocabulary
from llm42c.runtime.drafters import DraftModel, ModelSpec, SelfDraft


class DraftBuilds:
    """Compiles each draft model once, for all engines of `compiler`'s model.

    Called with a spec it raises ConfigError for a model of another vocabulary, WeightsError for one whose
    weights are quantised already, ModelNotFoundError and UnsupportedModelError.
    """

    def __init__(self, compiler: ModelCompiler, tokenizer: Any) -> None:
        self._compiler, self._tokenizer = compiler, tokenizer
        self._made: dict[ModelSpec, BuiltDraft] = {}

    def __call__(self, spec: ModelSpec) -> BuiltDraft:
        if spec not in self._made:
            module = self._quantised(spec) if isinstance(spec, SelfDraft) else self._loaded(spec)
            require_vocabulary(spec, _vocab_size(module), _vocab_size(self._compiler.model))
            # A model that its owner has loaded keeps its weights.
            lent = isinstance(spec, DraftModel) and spec.model is module
            compiler = ModelCompiler(module, keep_originals=lent)
            model = compiler.compile("pinned", release=True)
            compiler.release_originals()
            storages = [t.untyped_storage() for t in (*module.parameters(), *module.buffers())]
            own = {s.data_ptr(): s.nbytes() for s in storages}
            self._made[spec] = BuiltDraft(model, compiler.weights.nbytes + sum(own.values()))
        return self._made[spec]

    def _quantised(self, spec: SelfDraft) -> nn.Module:
        model = self._compiler.model
        read: Callable[[nn.Parameter], Tensor] = self._compiler.weights.value
        if isinstance(model, StandIn):
            model, read = model.loaded(), nn.Parameter.detach
        try:
            return quantised_copy(model, spec.format, read)
        except ImportError:
            raise ConfigError(f"{spec} needs the gguf package: pip install 'llm42c[gguf]'") from None

    def _loaded(self, spec: DraftModel) -> nn.Module:
        if isinstance(spec.model, nn.Module):
            if spec.model is self._compiler.model:
                raise ConfigError(f"{spec}: a model drafts for itself when quantised: speculate='self'")
            return spec.model
        if not isinstance(spec.model, str | Path):
            kind = type(spec.model).__name__
            raise ConfigError(f"a draft model is a folder, a hub id or a loaded model, not a {kind}")
        module, tokenizer = models.load_model(spec.model)
        known = None if self._tokenizer is None else self._tokenizer.get_vocab()
        if known is not None and tokenizer is not None and tokenizer.get_vocab() != known:
            raise ConfigError(f"{spec} cannot draft: its vocabulary is not the model's")
        return module


def _vocab_size(model: nn.Module) -> int:
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    return int(config.vocab_size)
