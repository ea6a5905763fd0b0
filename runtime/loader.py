"""From a model to a running engine: capture, compile, pack, describe, and put together."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import nn

from llm42c import quantised
from llm42c.capture.packed import PackedModel
from llm42c.codegen import cache
from llm42c.compile.compiler import Form, ModelCompiler
from llm42c.device import parse_device
from llm42c.errors import ConfigError
from llm42c.hub import models
from llm42c.options import TokenWeave
from llm42c.parallel.ranks import ALONE, Ranks
from llm42c.passes.base import Pass
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.contract import engine_contract
from llm42c.runtime.draft_builds import DraftBuilds
from llm42c.runtime.engine import Engine
from llm42c.runtime.graphs import CudaGraphs
from llm42c.runtime.lockstep import LockstepModel
from llm42c.runtime.plan.settings import settings
from llm42c.runtime.processors import Decode
from llm42c.runtime.structured import Grammars


@dataclass(frozen=True)
class BuiltEngine:
    """An engine with what it was made from."""

    engine: Engine
    compiler: ModelCompiler
    model: nn.Module
    tokenizer: Any
    drafts: DraftBuilds
    fast: Form = "pinned"
    _variants: WeakSet[Engine] = field(default_factory=WeakSet, repr=False, compare=False)

    def variant(self, **changes: Any) -> Engine:
        """Another engine on the same compiled model and weights, with a KV cache of its own.

        `changes` are fields of EngineConfig, as for :func:`build_engine`. Raises ConfigError.
        """
        _check_keys(changes)
        config = replace(self.engine.config, **changes)
        made = _engine(self.compiler, self.fast, config, self.tokenizer, self.drafts)
        self._variants.add(made)
        return made

    @property
    def ranks(self) -> Ranks:
        return self.compiler.ranks

    def close(self) -> None:
        """Close the engine and its variants (see :meth:`Engine.close`), and give the model its own parameters
        back. To be called once or more."""
        for engine in (self.engine, *self._variants):
            engine.close()
        self.compiler.restore()


def build_engine(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    *,
    fast: Form = "pinned",
    keep_originals: bool = False,
    compiler: ModelCompiler | None = None,
    device: str | None = None,
    persist_certificates: bool = True,
    ranks: Ranks = ALONE,
    token_weave: TokenWeave = "off",
    residual_shards: bool = False,
    passes: Sequence[str | Pass] = (),
    plan: str | Path | None = None,
    **config: Any,
) -> BuiltEngine:
    """Compile ``model`` (a Hugging Face decoder, or MODEL as the command line takes it) into an engine.

    ``fast`` is the form that decodes: ``"pinned"`` has the verifier's own kernels and is certified;
    ``"stock"`` is unpinned Inductor and MKL, whose tokens are verified and may roll back. ``ranks`` run the
    model together, and the engine; ``token_weave`` and ``residual_shards`` say what becomes of their
    all-reduces, and change no bit; see docs/tensor_parallel.md. ``passes`` of other packages run too, as
    docs/compile.md says; they are part of the contract's graph. ``device`` is where the model goes before
    it is compiled ("cpu" or "cuda"); by default it stays where it lies. ``plan`` is a file that
    ``llm42 plan --out`` wrote, whose sizes hold where no keyword says others. Further keywords are fields of
    EngineConfig. Raises ConfigError for an unknown one, naming the nearest, OptionsError for passes, and
    DeviceError.
    """
    place = None if device is None else parse_device(device)
    if isinstance(model, (str, Path)):
        module, loaded = models.load_model(model)
        tokenizer = tokenizer or loaded
    else:
        module = model
    _check_keys(config)
    if plan is not None:
        config = {**settings(plan, str(model) if isinstance(model, (str, Path)) else None), **config}
    if place is not None:
        module = module.to(place)
    config.setdefault("eos_token_ids", eos_token_ids(module))
    if persist_certificates:
        config.setdefault("certificates_path", _certificates())
    engine_config = EngineConfig(**config)
    if compiler is None:
        ranks.meet("the loaded model")
        compiler = ModelCompiler(
            module,
            keep_originals=keep_originals,
            ranks=ranks,
            token_weave=token_weave,
            residual_shards=residual_shards,
            passes=passes,
        )
    try:
        compiler.compile(fast, release=True)
        compiler.compile("pinned", release=True)  # second: it frees what the other form does not read
        compiler.ranks.meet("the compiled model")
        compiler.release_originals()
        # The fast form is not part of the contract: committed bits are the verifier's.
        drafts = DraftBuilds(compiler, tokenizer)
        engine = _engine(compiler, fast, engine_config, tokenizer, drafts)
    except BaseException:
        compiler.restore()  # the model is its owner's
        raise
    return BuiltEngine(engine, compiler, module, tokenizer, drafts, fast)


def _engine(
    compiler: ModelCompiler, fast: Form, config: EngineConfig, tokenizer: Any, drafts: DraftBuilds
) -> Engine:
    ranks, device = compiler.ranks, compiler.device
    on_gpu = device.type != "cpu"
    computation = compiler.compile("pinned").computation
    decoder: PackedModel = compiler.compile(fast)
    verifier: PackedModel = compiler.compile("pinned")
    if ranks.size > 1:
        decoder, verifier = LockstepModel(decoder, ranks), LockstepModel(verifier, ranks)
    return Engine(
        decoder,
        verifier,
        config,
        decode=None if tokenizer is None else text_decoder(tokenizer),
        grammars=None
        if tokenizer is None
        else Grammars(tokenizer, verifier.vocab_size, config.eos_token_ids),
        contract=engine_contract(
            verifier,
            config,
            weights=compiler.digest,
            computation=computation,
            tp_size=ranks.size,
            quantisation=quantised.formats(compiler.model),
        ),
        ranks=ranks,
        draft_models=drafts,
        # Ranks compare their batches on the host, which no graph can hold.
        graphs=CudaGraphs(device) if on_gpu and ranks.size == 1 and config.cuda_graphs == "auto" else None,
    )


def _certificates() -> str | None:
    """Where certificates are kept between processes: nowhere, if the cache folder cannot be used."""
    kept = cache.folder() / "certificates"
    usable = kept.is_dir() or cache.place(kept.name) is not None
    return str(kept) if usable else None


def eos_token_ids(model: nn.Module) -> tuple[int, ...]:
    """End-of-sequence ids of the model's generation configuration, else of its configuration."""
    for source in (getattr(model, "generation_config", None), model.config):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
    return ()


def text_decoder(tokenizer: Any) -> Decode:
    """Token ids to text, special tokens left out."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def _check_keys(config: dict[str, Any]) -> None:
    known = [f.name for f in fields(EngineConfig)]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown engine option {key!r}; did you mean {near!r}?")
