"""What the engine is to do for a request, resolved: equal jobs have equal keys, and equal answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm42c.errors import ContractError, RequestError
from llm42c.runtime import sealed
from llm42c.runtime.asked import params_to_json
from llm42c.runtime.contract import Contract
from llm42c.runtime.drafters import AS_ENGINE, Speculate
from llm42c.runtime.engine import Engine
from llm42c.runtime.hf.arguments import row_seeds
from llm42c.runtime.intake import check_limits, check_prompt
from llm42c.runtime.sampling import MAX_SEED, SamplingParams
from llm42c.runtime.server.errors import ApiError, refused
from llm42c.runtime.server.schema import Generation

# A grammar is compiled, and stop strings are looked for, between two steps: everybody waits for it.
MOST_STOPS, MOST_STOP_CHARACTERS = 64, 1024
MOST_GRAMMAR_CHARACTERS = 2**15


@dataclass(frozen=True)
class Job:
    """One request to the engine. `params` are resolved where the job is deterministic."""

    prompt: list[int]
    params: SamplingParams
    key: str  # of what decides the answer, 32 hex digits; empty for an ordinary one
    deterministic: bool = True
    receipt: bool = False
    speculate: Speculate = AS_ENGINE
    draft: list[int] | None = None
    forced: bool = False
    fresh: bool = False  # computed by itself: no equal one, under way or kept, answers for it
    empty: bool = False  # nothing is computed: no token was asked for


class Jobs:
    """Makes jobs for one engine. Reads only what of an engine never changes."""

    def __init__(self, engine: Engine) -> None:
        self.contract, self.limits = engine.contract, engine.limits
        self._grammars = engine.grammars
        self._eos = sorted(engine.config.eos_token_ids)

    def job(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        deterministic: bool = True,
        receipt: bool = False,
        speculate: Speculate = AS_ENGINE,
        draft: list[int] | None = None,
        forced: bool = False,
        fresh: bool = False,
    ) -> Job:
        """Raises RequestError, as the engine would for what its limits refuse."""
        ids = check_prompt(prompt, self.limits)
        max_tokens, _ = check_limits(ids, params, self.limits)
        if not deterministic:
            return Job(ids, params, "", False, receipt, AS_ENGINE, draft, forced)
        seed = params.derived_seed(ids) if params.seed is None else params.seed
        by = params.structured_by
        if params.is_structured and by is None and self._grammars is not None:
            by = self._grammars.name
        params = dataclasses.replace(params, max_tokens=max_tokens, seed=seed, structured_by=by)
        key = self._key(ids, params, receipt, draft if forced else None)
        return Job(ids, params, key, True, receipt, speculate, draft, forced, fresh)

    def copies(
        self, prompt: list[int], params: SamplingParams, count: int, body: Generation, deterministic: bool
    ) -> list[Job]:
        """`count` jobs for one prompt: the first has the seed as it is, others derive theirs from it."""
        seeds: list[int | None] = [params.seed] * count
        if count > 1 and (deterministic or params.seed is not None):
            seed = params.derived_seed(prompt) if params.seed is None else params.seed
            seeds = list(row_seeds(seed, 1, count))
        return [
            self.job(
                prompt,
                dataclasses.replace(params, seed=seed),
                deterministic=deterministic,
                receipt=body.receipt,
                speculate=None if body.speculate == "off" else body.speculate,
                draft=body.draft,
                fresh=body.fresh,
            )
            for seed in seeds
        ]

    def require(self, contract: str | dict[str, object] | None) -> None:
        """Raises ApiError 409 unless the pinned contract, its hash or the whole of it, is the engine's."""
        if contract is None or contract == self.contract.hash:
            return
        fields: list[str] | None = None
        if not isinstance(contract, str) or contract.lstrip().startswith("{"):
            text = contract if isinstance(contract, str) else json.dumps(contract)
            try:
                fields = Contract.from_json(text).diff(self.contract)
            except ContractError as error:
                raise ApiError(400, f"contract: {error}", "contract") from None
            if not fields:
                return
        what = "; ".join(fields) if fields else f"this server has {self.contract.hash}"
        more = {"fields": fields, "contract": json.loads(self.contract.to_json())}
        raise ApiError(
            409, f"the request pins another contract: {what}", "contract", "contract_mismatch", **more
        )

    def _key(self, prompt: list[int], params: SamplingParams, receipt: bool, forced: list[int] | None) -> str:
        asked = {
            "contract": self.contract.hash,
            "params": params_to_json(params, form=True),
            "ends": self._eos if not params.ignore_eos else [],
            "receipt": receipt,
        }
        hasher = hashlib.blake2b(sealed.canonical(asked).encode(), digest_size=16)
        for ids in (prompt, forced or []):
            hasher.update(np.array([len(ids), *ids], "<i8").tobytes())
        return hasher.hexdigest()


def sampling_params(body: Generation, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """The parameters that completions and chats share. Raises RequestError."""
    _check_sizes(body)
    greedy = body.temperature == 0
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        # Of the greatest logit alone nothing can be filtered.
        top_k=0 if greedy else body.top_k,
        top_p=1.0 if greedy else body.top_p,
        min_p=0.0 if greedy else body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias={_token(name): bias for name, bias in body.logit_bias.items()} or None,
        seed=None if body.seed is None else body.seed & MAX_SEED,
        stop_token_ids=tuple(body.stop_token_ids),
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        include_stop=body.include_stop,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        # The engine looks at the text where stop strings end it; elsewhere it is made outside its thread.
        detokenize=bool(body.stop),
        json_schema=body.json_schema,
        regex=body.regex,
        choice=None if body.choice is None else tuple(body.choice),
        grammar=body.grammar,
    )


def _check_sizes(body: Generation) -> None:
    """Raises RequestError."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop
    if len(stops) > MOST_STOPS or any(len(stop) > MOST_STOP_CHARACTERS for stop in stops):
        raise RequestError(f"stop may hold {MOST_STOPS} strings of at most {MOST_STOP_CHARACTERS} characters")
    for name in ("json_schema", "regex", "choice", "grammar"):
        given = getattr(body, name)
        size = len(given) if isinstance(given, str) else len(json.dumps(given))
        if size > MOST_GRAMMAR_CHARACTERS:
            raise RequestError(f"{name} may have {MOST_GRAMMAR_CHARACTERS} characters, not {size}")


def named_refusal(error: RequestError, prompt: str = "prompt") -> ApiError:
    return refused(error, Generation.model_fields.keys() | {"max_tokens", "logprobs"}, prompt)


def _token(name: str) -> int:
    if not name.isascii() or not name.isdigit() or len(name) > 18:
        raise RequestError(f"logit_bias: {name[:40]!r} is no token id")
    return int(name)
