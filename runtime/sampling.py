"""Sampling parameters, and the choice of tokens for the rows of a step.

Every row is drawn by one path whatever shares the step: (row of logits, the request's own parameters, seed,
position). Log-probs are of the raw logits, before penalties, bias and temperature.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llm42c.device import CPU, load_operators
from llm42c.errors import RequestError
from llm42c.runtime.outputs import TopLogprobs
from llm42c.runtime.processors import process_row
from llm42c.runtime.structured import KINDS, NOTHING_LEFT, check_structured

if TYPE_CHECKING:
    from llm42c.runtime.packing import Chunk
    from llm42c.runtime.request import Request

# (prompt + output token ids so far, logits [V] fp32) -> logits [V]. Must be a pure function: it may be called
# on proposals that are thrown away later.
LogitsProcessor = Callable[[list[int], Tensor], Tensor]

MAX_SEED = 2**63 - 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. Raises RequestError from the constructor.

    `temperature` 0 is greedy. Without a `seed`, a deterministic request derives one from its prompt and what
    decides the distribution (so that it stays a function of the request alone); an ordinary one gets a random
    seed.
    `repetition_penalty` counts prompt and output as Hugging Face does; `frequency_penalty` and
    `presence_penalty` count the output only, as the OpenAI API does. `min_tokens` masks end-of-sequence and
    stop ids, and ignores stop strings, until that many tokens came out. `logprobs=k` reports the k most
    likely tokens of every step.
    """

    max_tokens: int | None = None  # None: what fits, RequestOutput.limit says what that was
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # keep the stop string in the text
    ignore_eos: bool = False
    logprobs: int | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    detokenize: bool = True
    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    structured_by: str | None = None

    def __post_init__(self) -> None:
        for name in ("stop_token_ids", "stop", "logits_processors"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if not isinstance(value, Sequence):
                raise RequestError(f"{name} must be a list or tuple, not {type(value).__name__}")
            object.__setattr__(self, name, tuple(value))
        self._check_numbers()
        self._check_collections()
        self._check_conflicts()
        check_structured(self)

    def _check_numbers(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        _integer("top_k", self.top_k, 0)
        if self.seed is not None:
            _integer("seed", self.seed, 0)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0)
        _real("temperature", self.temperature, 0.0, math.inf)
        _real("top_p", self.top_p, 0.0, 1.0, above=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)

    def _check_collections(self) -> None:
        for name in ("include_stop", "ignore_eos", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, not {shown(getattr(self, name))}")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError("stop must hold non-empty strings")
        if any(not callable(p) for p in self.logits_processors):
            raise RequestError("logits_processors must hold callables (token_ids, logits) -> logits")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise RequestError("logit_bias must be a dict of token id to number")
            for token, bias in self.logit_bias.items():
                _integer("logit_bias token id", token, 0)
                _real(f"logit_bias[{shown(token)}]", bias, -1e6, 1e6)
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # the caller's may change

    def _check_conflicts(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})")
        if self.temperature == 0.0 and (self.top_k > 1 or self.top_p < 1.0 or self.min_p > 0.0):
            raise RequestError("top_k, top_p and min_p have no effect at temperature 0; set temperature > 0")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True")

    @property
    def is_structured(self) -> bool:
        """Whether a grammar says what the output must be."""
        return any(getattr(self, kind) is not None for kind in KINDS)

    @property
    def filters(self) -> bool:
        """Whether tokens are left out by how likely they are."""
        return self.temperature > 0 and bool(self.top_k or self.top_p < 1 or self.min_p)

    @property
    def processes_logits(self) -> bool:
        """Whether rows must be rewritten before sampling."""
        return bool(
            self.repetition_penalty != 1.0
            or self.frequency_penalty
            or self.presence_penalty
            or self.logit_bias
            or self.min_tokens
            or self.logits_processors
        )

    def derived_seed(self, prompt: Sequence[int]) -> int:
        """A seed in [0, 2^63): a function of the prompt and of the distribution that tokens are drawn from.

        Numbers count as the sampler reads them, so 1 and 1.0 are one temperature. What does not touch the
        distribution (limits, stops, `logprobs`, `detokenize`) has no part in it: a longer run begins as a
        shorter one. User callables have none either.
        """
        bias = sorted((token, b) for token, b in (self.logit_bias or {}).items() if b)
        numbers = (
            *(self.temperature, self.top_p, self.min_p),
            *(self.repetition_penalty, self.frequency_penalty, self.presence_penalty),
            *(b for _, b in bias),
        )
        ids = (min(self.top_k, MAX_SEED), len(bias), *(token for token, _ in bias), *prompt)
        data = (np.array(numbers, np.float32) + np.float32(0)).astype("<f4").tobytes()  # -0 + 0 is 0
        data += np.array(ids, dtype="<i8").tobytes()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") & MAX_SEED


def shown(value: Any) -> str:
    """A user's value inside of a message: one line, never long."""
    try:
        text = repr(value)
    except Exception:  # of a foreign object, or of an integer with thousands of digits
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _integer(name: str, value: Any, low: int, high: int = MAX_SEED) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be an integer, not {shown(value)}")
    if not low <= value <= high:
        wanted = f">= {low}" if value < low else f"<= {high}"
        raise RequestError(f"{name} must be {wanted}, not {shown(value)}")


def _real(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raises RequestError unless `value`, rounded to float32 as the sampler sees it, is in [low, high]."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{name} must be a number, not {shown(value)}")
    seen = float(np.float32(value)) if abs(value) <= _FLOAT32_MAX else math.nan
    if not low <= seen <= high or (above and seen == low):
        interval = f"{'(' if above else '['}{low}, {high}]"
        raise RequestError(f"{name} must be finite and in {interval}, not {shown(value)}")


class Sampler(Protocol):
    """Row-independent choice of tokens; the operators of `torch.ops.llm42` by default."""

    def sample(
        self,
        logits: Tensor,  # [R, V]
        temperature: Tensor,  # [R] float32, 0 = greedy
        top_k: Tensor,  # [R] int32, 0 = off
        top_p: Tensor,  # [R] float32, 1 = off
        min_p: Tensor,  # [R] float32, 0 = off
        seed: Tensor,  # [R] int64
        position: Tensor,  # [R] int64
    ) -> tuple[Tensor, Tensor]:
        """Tokens [R] int64 (-1: the row holds NaN or no finite value), their log-probs [R] float32."""
        ...

    def token_logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probs [R] float32 of `tokens` [R], with the bits that `sample` gives."""
        ...

    def top_logprobs(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k greatest log-probs of each row, descending, ties by index: [R, k] float32, [R, k] int64."""
        ...

    def apply_token_mask(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Logits [R, V] with minus infinity where the bit in `mask` [R, ceil(V / 32)] int32 is not set."""
        ...


def operator_sampler(device: torch.device = CPU) -> Sampler:
    """The operators `llm42::sample`, `llm42::token_logprobs` and `llm42::top_logprobs`, of logits there."""
    load_operators(device)
    sampler: Sampler = torch.ops.llm42
    return sampler


@dataclass(slots=True)
class Sampled:
    """One entry a row, in the order of the chunks' rows."""

    tokens: list[int]  # -1: the row holds NaN or no finite value
    logprobs: list[float]
    tops: dict[int, TopLogprobs]  # rows of requests that asked for `logprobs`
    errors: dict[int, str]  # rows whose logits processors failed; their token means nothing


@dataclass(slots=True)
class _Params:
    """Per-row parameter tensors of one list of requests, kept while the list stays the same."""

    requests: list[Request]
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    special: list[int]  # rows that need processing, a given token or top log-probs
    masked: bool  # each row is drawn from what a grammar leaves, and nothing else rewrites any


class RowSampler:
    """Samples the rows of a step, rewriting those that penalties, bias, processors or a grammar change.

    Where the logits lie, masks too; other rewriting is done on the CPU.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._params: _Params | None = None

    def __call__(self, logits: Tensor, chunks: Sequence[Chunk]) -> Sampled:
        """`logits` [R', V] with R' >= rows of `chunks`; only the leading rows are read."""
        rows = [(c.request, p + 1) for c in chunks for p in range(c.first_row, c.end)]
        params = self._row_params([r for r, _ in rows], logits.device)
        position = torch.from_numpy(np.array([p for _, p in rows], dtype=np.int64)).to(logits.device)
        logits = logits[: len(rows)]
        if params.masked:  # drawn once, from masked rows
            result = Sampled([0] * len(rows), [0.0] * len(rows), {}, {})
        else:
            token, logprob = self._draw(logits, params, position)
            result = Sampled(token.tolist(), logprob.tolist(), {}, {})
        if params.special:
            self._special(logits, rows, params, position, result)
        return result

    def _row_params(self, requests: list[Request], device: torch.device) -> _Params:
        if self._params is not None and self._params.requests == requests:
            return self._params
        p = [r.params for r in requests]
        self._params = _Params(
            requests,
            temperature=torch.tensor([x.temperature for x in p], dtype=torch.float32, device=device),
            top_k=torch.tensor([min(x.top_k, 2**31 - 1) for x in p], dtype=torch.int32, device=device),
            top_p=torch.tensor([x.top_p for x in p], dtype=torch.float32, device=device),
            min_p=torch.tensor([x.min_p for x in p], dtype=torch.float32, device=device),
            seed=torch.tensor([r.seed for r in requests], dtype=torch.int64, device=device),
            special=[
                i
                for i, r in enumerate(requests)
                if r.processed
                or r.grammar is not None
                or r.forced is not None
                or r.params.logprobs is not None
            ],
            masked=all(r.grammar is not None and not r.processed and r.params.filters for r in requests),
        )
        return self._params

    def _draw(
        self, logits: Tensor, p: _Params, position: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        args = (p.temperature, p.top_k, p.top_p, p.min_p, p.seed, position)
        if rows is not None:
            args = (*(a[rows] for a in args),)  # type: ignore[assignment]
        return self._sampler.sample(logits, *args)

    def _special(
        self,
        logits: Tensor,
        rows: list[tuple[Request, int]],
        params: _Params,
        position: Tensor,
        result: Sampled,
    ) -> None:
        """Redo processed rows on rewritten logits, put given tokens in place of chosen ones, and collect the
        most likely tokens where asked for."""
        for processed in (False, True):
            self._redo(logits, rows, params, position, processed, result)
        given = [i for i in params.special if rows[i][0].forced is not None and result.tokens[i] >= 0]
        if given:
            index = torch.tensor(given, device=logits.device)
            tokens = torch.tensor([_given(*rows[i]) for i in given], device=logits.device)
            logprobs = self._sampler.token_logprobs(logits[index], tokens)
            for i, token, logprob in zip(given, tokens.tolist(), logprobs.tolist(), strict=True):
                result.tokens[i], result.logprobs[i] = token, logprob
        wanted = {
            i: min(k, logits.shape[1])
            for i in params.special
            if (k := rows[i][0].params.logprobs) is not None
        }
        result.tops.update(self._tops(logits, wanted))

    def _redo(
        self,
        logits: Tensor,
        rows: list[tuple[Request, int]],
        params: _Params,
        position: Tensor,
        processed: bool,
        result: Sampled,
    ) -> None:
        """Draw rows anew from the logits that their requests leave: those that are `processed` on the CPU, or
        those that a grammar masks only."""
        todo = [
            i
            for i in params.special
            if result.tokens[i] >= 0
            and rows[i][0].processed == processed
            and (processed or not _stands(*rows[i], result.tokens[i]))
        ]
        if not todo:
            return
        raw = logits if len(todo) == len(logits) else logits[torch.tensor(todo, device=logits.device)]
        work = raw
        if processed:
            work = raw.to("cpu", torch.float32, copy=True)
            for j, i in enumerate(todo):
                try:
                    process_row(rows[i][0], work[j], rows[i][1])
                except Exception as error:
                    result.errors[i] = f"{type(error).__name__}: {error}"
        mask = self._masks([rows[i] for i in todo], todo, work.shape[1], result)
        if mask is not None:
            work = self._sampler.apply_token_mask(work, mask.to(work.device))
        index = torch.tensor(todo, device=logits.device)
        tokens, _ = self._draw(work.to(raw.device), params, position, index)
        logprobs = self._sampler.token_logprobs(raw, tokens.clamp(min=0))
        for i, token, logprob in zip(todo, tokens.tolist(), logprobs.tolist(), strict=True):
            refused = math.isnan(logprob)  # the row as it came
            result.tokens[i], result.logprobs[i] = -1 if refused else token, logprob
            if token < 0 and not refused and rows[i][0].grammar is not None:
                result.errors.setdefault(i, NOTHING_LEFT)

    def _masks(
        self, rows: list[tuple[Request, int]], numbers: list[int], vocab: int, result: Sampled
    ) -> Tensor | None:
        """[R, ceil(vocab / 32)] int32 for `rows`, whose numbers in the step are `numbers`; None if none has a
        grammar."""
        if all(request.grammar is None for request, _ in rows):
            return None
        masks = np.full((len(rows), -(-vocab // 32)), -1, np.int32)
        for j, (request, length) in enumerate(rows):
            if request.grammar is not None:
                try:
                    masks[j] = request.grammar.mask(request, length)
                except ValueError as error:
                    result.errors.setdefault(numbers[j], str(error))
        return torch.from_numpy(masks)

    def _tops(self, logits: Tensor, wanted: dict[int, int]) -> dict[int, TopLogprobs]:
        """The k most likely tokens of each row in `wanted` (row -> k), by one call for all of them."""
        most = max(wanted.values(), default=0)
        if most == 0:
            return {i: [] for i in wanted}
        if len(wanted) < len(logits):
            logits = logits[torch.tensor(list(wanted), device=logits.device)]
        values, ids = (x.tolist() for x in self._sampler.top_logprobs(logits, most))
        return {
            i: list(zip(ids[j][:k], values[j][:k], strict=True)) for j, (i, k) in enumerate(wanted.items())
        }


def _stands(request: Request, length: int, token: int) -> bool:
    """Whether what was drawn from an unmasked row may stay, so that its mask need not be known.

    The greatest score of all is the greatest of those that are allowed, if it is allowed. Filters look at the
    whole row, so with some the row is always masked.
    """
    grammar = request.grammar
    return grammar is None or (not request.params.filters and grammar.permits(request, length, token))


def _given(request: Request, length: int) -> int:
    """The token that a forced request has behind its first `length` ones."""
    assert request.forced is not None
    return request.forced[length - request.prompt_len]
