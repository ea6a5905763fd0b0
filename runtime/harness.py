"""A model as lm-evaluation-harness asks for one; the package itself is needed only by :func:`register`.

Every number is that of the engine's promise: a log-likelihood does not depend on the batch size, on the order
of the requests, or on which tasks run together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llm42c.errors import ConfigError, RequestError
from llm42c.hub import models
from llm42c.runtime.loader import BuiltEngine, build_engine
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.scoring import Scored

NAME = "llm42"
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "seed", "min_tokens")


class HarnessModel:
    """The methods that lm-evaluation-harness calls. Requests are its ``Instance``s: what has ``args``.

    ``pretrained`` is a MODEL, ``dtype`` as in `llm42 generate`; further arguments are fields of
    EngineConfig. The engine batches by itself, so ``batch_size`` and ``max_batch_size`` are not looked at.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        dtype: str | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
        built: BuiltEngine | None = None,
        **config: Any,
    ) -> None:
        super().__init__()  # of the harness's own class, if there is one
        import torch

        if dtype not in (None, "auto", "bfloat16", "float16", "float32"):
            raise ConfigError(f"dtype must be bfloat16, float16, float32 or auto, not {dtype!r}")
        if built is None:
            wanted = None if dtype in (None, "auto") else getattr(torch, dtype)
            if device in (None, "cuda:0"):  # which the harness says when it was told nothing
                device = "cuda" if torch.cuda.is_available() else "cpu"
            model, tokenizer = models.load_model(pretrained, wanted)
            built = build_engine(model, tokenizer, device=device, **config)
        self.built, self.engine, self.tokenizer = built, built.engine, built.tokenizer
        if self.tokenizer is None:
            raise ConfigError(f"{pretrained} has no tokenizer, which the harness needs")
        self.max_gen_toks = max_gen_toks

    # -- what is asked ---------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the sum of the continuation's log-probs, and whether each of its
        tokens is the likeliest one. What does not fit is cut off at the left."""
        results = self._score([self._pair(*request.args) for request in requests])
        found = [(s.total, all(s.greedy)) for s in results]
        return self._remember("loglikelihood", requests, found)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each (text,): the log-likelihood of all of it. Longer ones than the context are scored in
        windows; each token once, and the last window with as much before it as fits."""
        windows = [list(self._windows(self._encode(request.args[0], False))) for request in requests]
        scored = iter(self._score([pair for some in windows for pair in some]))
        found = [sum(next(scored).total for _ in some) for some in windows]
        return self._remember("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, arguments): the text up to the first of the strings in ``until``."""
        params = [self._params(dict(request.args[1])) for request in requests]
        prompts = [
            self._encode(request.args[0], True)[-(self.max_length - (p.max_tokens or 0)) :]
            for request, p in zip(requests, params, strict=True)
        ]
        outputs = self.engine.generate(prompts, params)
        failed = next((o.error for o in outputs if o.error is not None), None)
        if failed is not None:
            raise RequestError(f"a request of the harness failed: {failed}")
        return self._remember("generate_until", requests, [o.text for o in outputs])

    # -- what it is asked about ------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens of one request, prompt and output."""
        limits = self.engine.limits
        return min(limits.max_model_len, limits.num_pages * limits.page_size)

    @property
    def eot_token_id(self) -> int:
        return self.engine.config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return (self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def get_model_info(self) -> dict[str, Any]:
        """For the results' configuration: what the numbers depend on."""
        return {"llm42_contract": self.engine.contract.hash}

    # -- how -------------------------------------------------------------------------------------------------

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, tokenised together; spaces between them belong to the continuation."""
        if not context:
            ids = self._encode(continuation, False)
            given, rest = [self.prefix_token_id], ids
            if ids[:1] == given:
                given, rest = ids[:1], ids[1:]
        else:
            text = context.rstrip()
            whole = self._encode(context + continuation, True)
            given = self._encode(text, True)
            rest = whole[len(given) :]
        room = self.max_length - len(rest)
        if room < 1:
            raise RequestError(f"a continuation of {len(rest)} tokens does not fit into {self.max_length}")
        return given[-room:], rest

    def _windows(self, tokens: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        most, start = self.max_length - 1, 0
        while start < len(tokens):
            end = min(start + most, len(tokens))
            before = tokens[max(0, end - most - 1) : start] if start else [self.prefix_token_id]
            yield before, tokens[start:end]
            start = end

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Scored]:
        scored = iter(self.engine.score_batch([pair for pair in pairs if pair[1]]))
        return [next(scored) if rest else Scored([], []) for _, rest in pairs]

    def _params(self, arguments: dict[str, Any]) -> SamplingParams:
        """Raises RequestError for an argument that has no meaning here."""
        until = arguments.pop("until", None) or []
        lengths = [arguments.pop(name, None) for name in LENGTHS]
        count = next((int(n) for n in lengths if n is not None), self.max_gen_toks)
        temperature = float(arguments.pop("temperature", None) or 0.0)
        if not arguments.pop("do_sample", temperature > 0):
            temperature = 0.0
        chosen = {name: arguments.pop(name) for name in SAMPLING if name in arguments}
        if arguments:
            raise RequestError(
                f"generation arguments that llm42 does not have: {', '.join(sorted(arguments))}"
            )
        if temperature == 0.0:
            for name in ("top_k", "top_p", "min_p"):
                chosen.pop(name, None)
        return SamplingParams(
            max_tokens=min(count, self.max_length - 1),
            temperature=temperature,
            stop=tuple(s for s in ([until] if isinstance(until, str) else until) if s),
            **chosen,
        )

    def _remember(self, kind: str, requests: Sequence[Any], results: list[Any]) -> list[Any]:
        """For the harness's cache, if it has one."""
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            for request, result in zip(requests, results, strict=True):
                hook.add_partial(kind, request.args, result)
        return results


def register() -> type:
    """Let the harness of this process know the model "llm42"; returns its class. Raises ConfigError."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import model_registry, register_model
    except ImportError:
        raise ConfigError("lm-evaluation-harness is not installed: pip install 'llm42c[lm-eval]'") from None
    import lm_eval.models  # noqa: F401  # an empty registry is filled once, by whoever asks first

    if NAME in model_registry:
        known: type = model_registry.get(NAME)
        return known
    made: type = register_model(NAME)(type("Llm42LM", (HarnessModel, LM), {}))
    return made
