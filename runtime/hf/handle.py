"""What a model carries while it is deterministic, and how it becomes ordinary again.

The model stays the object it was. `generate`, `generate_batch` and `llm42` become attributes of the instance;
the weights live packed in the engine, and come back into the model, bit for bit, the moment somebody else
needs them: a direct forward pass, `to`, `load_state_dict`, `off`, `undo`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import fields
from typing import Any, NoReturn

import torch
from transformers.generation.continuous_batching.requests import GenerationOutput

from llm42c.capture.dynamo import KVSpec
from llm42c.capture.support import context_limit, require_supported
from llm42c.compile.compiler import ModelCompiler
from llm42c.device import device_of_model, dtype_of_model
from llm42c.errors import RequestError
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.contract import Contract
from llm42c.runtime.hf import batch, generate, streaming
from llm42c.runtime.hf.fingerprint import Fingerprint
from llm42c.runtime.hf.streaming import StreamedToken
from llm42c.runtime.loader import BuiltEngine, build_engine
from llm42c.runtime.pump import Pump
from llm42c.runtime.stats import Stats

_KV_BUDGET = 256 * 2**20
_CONFIG = {f.name for f in fields(EngineConfig)}


class Handle:
    """The deterministic side of one model, as its attribute `llm42`.

    `compilations` counts how often the model was compiled: once, unless its weights, dtype, modules or hooks
    change.
    """

    def __init__(self, model: Any, original: Callable[..., Any], options: dict[str, Any]) -> None:
        require_supported(model)
        self.model = model
        self.options = options
        self.compilations = 0
        self._original = original  # the model's own generate
        self._before: dict[str, Any] = {}  # instance attributes that ours hide
        self._installed = False
        self._lock = threading.RLock()
        self._built: BuiltEngine | None = None
        self._pump: Pump | None = None
        self._released = False
        self._fingerprint: Fingerprint | None = None
        self._hooks: list[Any] = []
        self._owners: set[torch.nn.Module] = set()  # modules whose own weights are packed

    def __repr__(self) -> str:
        if self._pump is None:
            return f"<deterministic {type(self.model).__name__}, not compiled yet>"
        return f"<deterministic {type(self.model).__name__}, contract {self._pump.engine.contract.hash[:16]}>"

    # -- what a user calls -----------------------------------------------------------------------------------

    def generate(self, *positional: Any, **keywords: Any) -> Any:
        """Hugging Face's `generate`, deterministic; takes `seed=` (an int, or one for each prompt) besides.

        Raises RequestError, naming the argument, for what cannot be kept.
        """
        with _own_modes(self.model):
            call = generate.prepare(self.model, self._original, positional, keywords)
            return generate.generate(call, self._ready())

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: Any = None,
        *,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        **keywords: Any,
    ) -> dict[str, GenerationOutput]:
        """Hugging Face's `generate_batch`, deterministic; takes the arguments of `generate` besides."""
        if not len(inputs):
            return {}
        with _own_modes(self.model):
            call, prompts = batch.prepare_batch(
                self.model, self._original, inputs, generation_config, keywords
            )
            return batch.generate_batch(
                call, prompts, self._ready(), record_timestamps=record_timestamps, progress_bar=progress_bar
            )

    async def stream(
        self,
        inputs: Any,
        generation_config: Any = None,
        *,
        attention_mask: torch.Tensor | None = None,
        **keywords: Any,
    ) -> AsyncIterator[StreamedToken]:
        """Committed tokens as they come, for the arguments of `generate_batch`.

        inputs: one prompt (ids, or a tensor [n]) or several (a list of those, or a tensor [B, W] with its
        attention_mask). Leaving the iterator aborts what has not ended.
        """
        with _own_modes(self.model):
            prompts = streaming.prompts_of(inputs, attention_mask)
            call, prompts = batch.prepare_batch(
                self.model, self._original, prompts, generation_config, keywords
            )
            pump = self._ready()
        async for token in streaming.stream(call, prompts, pump):
            yield token

    def init_continuous_batching(self, *_: Any, **__: Any) -> NoReturn:
        """Hugging Face's own batching would answer by what shares a batch. Raises RequestError."""
        raise RequestError(
            "init_continuous_batching: Hugging Face's batching is not supported by a deterministic model; "
            "use generate_batch or llm42.stream"
        )

    @property
    def contract(self) -> Contract:
        """What the bits of the outputs depend on besides prompt and parameters."""
        return self._ready().engine.contract

    def stats(self) -> Stats:
        """Counters of the engine."""
        return self._ready().engine.stats()

    def warm_up(self) -> None:
        """Compile now instead of at the first call."""
        self._ready()

    def settle(self) -> None:
        """Probe the batch shapes met so far now, instead of between the steps of later calls."""
        with _own_modes(self.model):
            self._ready().settle()

    # -- installing and removing -----------------------------------------------------------------------------

    def install(self) -> None:
        """Put our attributes on the model."""
        with self._lock:
            mine, attributes = self._attributes(), self.model.__dict__
            self._before = {name: attributes[name] for name in mine if name in attributes}
            attributes.update(mine)
            self._installed = True

    def remove(self) -> None:
        """Take our attributes off the model and give its weights back; the engine stays ready."""
        with self._lock:
            self._give_back()
            if self._installed:
                for name in self._attributes():
                    self.model.__dict__.pop(name, None)
                self.model.__dict__.update(self._before)
                self._installed = False

    def _attributes(self) -> dict[str, Any]:
        """What stands on the model instance, before the attributes of its class."""
        return {
            "llm42": self,
            "generate": self.generate,
            "generate_batch": self.generate_batch,
            "init_continuous_batching": self.init_continuous_batching,
            "_apply": self._apply,
            "__getstate__": self._refuse_copy,
        }

    # -- weights and engine ----------------------------------------------------------------------------------

    def _ready(self) -> Pump:
        """The engine, built or built again if the weights are no longer those it was made from."""
        with self._lock:
            if self._pump is not None and self._fingerprint != self._current_fingerprint():
                self._discard()
            if self._pump is None:
                self._build()
            assert self._pump is not None
            return self._pump

    def _build(self) -> None:
        require_supported(self.model)
        options = dict(self.options)
        keep, passes = options.pop("keep_weights", False), options.pop("passes", ())
        # A bad value is refused before the capture.
        EngineConfig(**{n: value for n, value in options.items() if n in _CONFIG})
        with _own_modes(self.model):
            compiler = ModelCompiler(self.model, keep_originals=keep, passes=passes)
            if "kv_cache_bytes" not in options and "num_pages" not in options:
                options["kv_cache_bytes"] = self._kv_budget(compiler.kv_spec)
            self._built = build_engine(self.model, compiler=compiler, **options)
        self.compilations += 1
        self._pump = Pump(self._built.engine)
        self._released = not keep
        self._watch()

    def _kv_budget(self, spec: list[KVSpec]) -> int:
        """At most what full batches of full contexts need, at least one full context, else 256 MiB."""
        context = self.options.get("max_model_len") or context_limit(self.model)
        item = dtype_of_model(self.model).itemsize
        token = sum(2 * s.num_kv_heads * s.head_dim for s in spec) * item
        one = (min(context, 8192) + 16) * token
        return max(one, min(_KV_BUDGET, one * self.options.get("max_num_seqs", 32)))

    def _watch(self) -> None:
        """Remember the model as it is, and notice who else needs its weights."""
        if self._released:
            assert self._built is not None
            is_released = self._built.compiler.weights.is_released
            self._owners = {
                m for m in self.model.modules() if any(map(is_released, m.parameters(recurse=False)))
            }
            self._hooks = [self.model.register_load_state_dict_pre_hook(self._give_back)]
            for module in self._owners | {self.model, self.model.base_model}:
                self._hooks.append(module.register_forward_pre_hook(self._give_back))
            for module in self._owners - {self.model}:
                module.__dict__["_apply"] = functools.partial(self._apply_to, module)
        self._fingerprint = self._current_fingerprint()

    @torch.compiler.disable
    def _give_back(self, *_: Any) -> None:
        """Put the original weights into the model, unless they are there."""
        with self._lock:
            if not self._released or self._built is None:
                return
            changed = self._fingerprint != self._current_fingerprint()
            self._restore()
            if not changed:
                self._fingerprint = self._current_fingerprint()

    def _restore(self) -> None:
        assert self._built is not None
        for hook in self._hooks:
            hook.remove()
        for module in self._owners - {self.model}:
            module.__dict__.pop("_apply", None)
        self._hooks, self._owners = [], set()
        self._built.compiler.restore()
        self._released = False

    def unpack(self) -> None:
        """Put the weights into the model, to be changed there; `release` packs them away again."""
        self._ready()
        self._give_back()

    def release(self) -> None:
        """Free the model's own copy of the weights again, after something needed them."""
        with self._lock:
            if self._ready() and not self._released and self._built is not None:
                self._built.compiler.release_originals()
                self._released = True
                self._watch()

    def _discard(self) -> None:
        if self._released:
            self._restore()
        self._built = self._pump = None

    def _current_fingerprint(self) -> Fingerprint:
        return Fingerprint.of(self.model, {hook.id for hook in self._hooks})

    def _apply_to(self, module: torch.nn.Module, *positional: Any, **keywords: Any) -> Any:
        """`to`, `half`, ... of a part of the model whose weights are packed."""
        self._give_back()
        return type(module)._apply(module, *positional, **keywords)

    def _apply(self, *positional: Any, **keywords: Any) -> Any:
        """`to`, `half`, `float`, ...: they convert the model's own weights."""
        self._give_back()
        own = self._before.get("_apply") or type(self.model)._apply.__get__(self.model)
        return own(*positional, **keywords)

    # -- copies ----------------------------------------------------------------------------------------------

    def _refuse_copy(self) -> NoReturn:
        raise TypeError(
            "a deterministic model holds compiled code and cannot be pickled or copied: use save_pretrained, "
            "or llm42c.deterministic.undo(model) first"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse_copy()


@contextlib.contextmanager
def _own_modes(model: Any) -> Iterator[None]:
    """Neither gradients nor the caller's inference mode, autocast or default device: the model decides."""
    place = device_of_model(model).type
    elsewhere = torch.get_default_device().type != "cpu"  # where the tensors of requests are made
    default = torch.device("cpu") if elsewhere else contextlib.nullcontext()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(place, enabled=False), default:
        yield
