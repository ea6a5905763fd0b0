"""The door of an engine: a request is made of what a user asks for, or refused in one line."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from llm42c.errors import ConfigError, Llm42Error, RequestError
from llm42c.parallel.ranks import Ranks
from llm42c.runtime.asked import require_portable
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.draft_models import DraftModels
from llm42c.runtime.drafters import AS_ENGINE, DrafterSource, Speculate, drafter_source
from llm42c.runtime.intake import Limits, check_flag, check_limits, check_prompt, check_tokens
from llm42c.runtime.processors import Decode, TextState
from llm42c.runtime.request import Request
from llm42c.runtime.sampling import MAX_SEED, SamplingParams
from llm42c.runtime.structured import Grammars, Matcher


class Door:
    """Makes requests of what users ask for; every one that cannot be served is refused here."""

    def __init__(
        self,
        limits: Limits,
        config: EngineConfig,
        decode: Decode | None,
        grammars: Grammars | None,
        ranks: Ranks,
        draft_models: DraftModels,
    ) -> None:
        """Raises ConfigError if the engine's own drafter cannot draft."""
        self._limits, self._decode, self._grammars, self._ranks = limits, decode, grammars, ranks
        self._draft_models = draft_models
        self._drafters = self._source(config.speculate)
        if self._drafters is not None and self._drafters.model is not None:
            draft_models.of(self._drafters.model)
        self._eos_ids = frozenset(config.eos_token_ids)
        self._max_pages = -(-limits.max_model_len // limits.page_size)

    def request(
        self,
        request_id: str,
        arrival: int,
        prompt_ids: Sequence[int],
        params: SamplingParams | None,
        *,
        deterministic: bool,
        stream: bool,
        draft: Sequence[int] | None,
        forced: bool,
        speculate: Speculate,
        receipt: bool,
    ) -> Request:
        """As `Engine.submit` says. Raises RequestError (ContractMismatchError for who computes masks)."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be a SamplingParams, not {type(params).__name__}")
        flags = {"deterministic": deterministic, "stream": stream, "forced": forced, "receipt": receipt}
        for name, value in flags.items():
            check_flag(name, value)
        prompt = check_prompt(prompt_ids, self._limits)
        max_tokens, limited_by = check_limits(prompt, params, self._limits)
        text = None
        if self._decode is not None and params.detokenize and (stream or params.stop):
            text = TextState(self._decode, params.stop)
        if draft is not None:
            draft = check_tokens("the draft", draft, self._limits.vocab_size, max_tokens)
        if not deterministic and (draft is not None or receipt):
            raise RequestError("drafts and receipts are for deterministic requests")
        if forced and len(draft or ()) < max_tokens:
            raise RequestError("a forced draft must have max_tokens tokens")
        if receipt:
            require_portable(params, "a receipt")
        grammar = self._grammar(params, forced)
        source = self._drafters if speculate == AS_ENGINE else self._requested(speculate)
        return Request(
            request_id,
            arrival,
            prompt,
            params,
            deterministic=deterministic,
            stream=stream,
            seed=self._seed(params, prompt, deterministic),
            max_tokens=max_tokens,
            limited_by=limited_by,
            eos_ids=self._eos_ids,
            max_pages=self._max_pages,
            text=text,
            draft=draft,
            forced=forced,
            wants_receipt=receipt,
            drafter_source=source if deterministic else None,
            grammar=grammar,
        )

    def _source(self, speculate: Speculate) -> DrafterSource | None:
        """Raises ConfigError. Of itself nobody drafts on several ranks: to agree on drafts costs them a
        message a step."""
        return None if speculate == "auto" and self._ranks.size > 1 else drafter_source(speculate)

    def _requested(self, speculate: Speculate) -> DrafterSource | None:
        """The first request that names a draft model waits until it is built. Raises RequestError."""
        try:
            source = self._source(speculate)
        except ConfigError as error:
            raise RequestError(str(error)) from None
        if source is not None and source.model is not None:
            try:
                self._draft_models.of(source.model)
            except Llm42Error as error:
                raise RequestError(str(error)) from error
        return source

    def _seed(self, params: SamplingParams, prompt: list[int], deterministic: bool) -> int:
        if params.seed is not None:
            return params.seed
        if deterministic:
            return params.derived_seed(prompt)
        seed: int = self._ranks.share(secrets.randbelow(MAX_SEED + 1))
        return seed

    def _grammar(self, params: SamplingParams, forced: bool) -> Matcher | None:
        if not params.is_structured:
            return None
        if self._grammars is None:
            raise RequestError("structured output needs an engine with a tokenizer (grammars=...)")
        if forced:
            raise RequestError("a forced draft is taken as it is; it can have no grammar")
        return self._grammars.matcher(params)
