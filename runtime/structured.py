"""Structured output: which tokens may come next, as a mask, by the package llguidance.

A mask is a function of the grammar and of what the request has put out before that row. A matcher is brought
to a row's tokens by taking back what differs and reading the rest, so that a rejected proposal, a preemption
or another engine leaves nothing behind.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm42c.errors import ContractMismatchError, RequestError

if TYPE_CHECKING:
    from llm42c.runtime.request import Request
    from llm42c.runtime.sampling import SamplingParams

_log = logging.getLogger(__name__)

RULE = "masks/1"  # what is made of llguidance's masks; whoever changes a bit of it raises the version
KINDS = ("json_schema", "regex", "choice", "grammar")
NOTHING_LEFT = "the grammar allows only tokens that min_tokens, logit_bias or a logits processor rule out"


class Grammars:
    """Makes matchers for one tokenizer: a fast one of transformers, or such as
    `llguidance.TokenizerWrapper` takes."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self.words = -(-vocab_size // 32)  # of a mask
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.eos_ids = frozenset(eos_ids)

    def matcher(self, params: SamplingParams) -> Matcher:
        """Raises RequestError for a grammar that cannot be used, and where there is no llguidance;
        ContractMismatchError where others compute masks than those that `params` pin."""
        library, tokenizer = _llguidance(), self._read
        if params.structured_by not in (None, self.name):
            raise ContractMismatchError(
                f"the request pins another structured_by: {params.structured_by} -> {self.name}"
            )
        kind, text = wanted(params)
        try:
            source = _source(library, kind, text)
            failed, messages = library.LLMatcher.validate_grammar_with_warnings(source, tokenizer)
        except ValueError as error:
            failed, messages = True, [str(error)]
        if failed:
            raise RequestError(f"{kind} cannot be used: {_line(messages[0])}")
        for message in messages:
            _log.warning("%s: %s", kind, _line(message))
        return Matcher(self, functools.partial(library.LLMatcher, tokenizer, source, log_level=0))

    @functools.cached_property
    def name(self) -> str:
        """Who computes masks: rule, package and its version, and a digest of the tokens as it knows them."""
        tokenizer, hasher = self._read, hashlib.blake2b(digest_size=8)
        for token in range(tokenizer.vocab_size):
            text = tokenizer.decode_bytes([token])
            hasher.update(b"%d %d " % (len(text), tokenizer.is_special_token(token)) + text)
        version = _llguidance().get_version().split()[0].removeprefix("llguidance@")
        return f"{RULE}, llguidance {version}, tokens {hasher.hexdigest()}"

    @functools.cached_property
    def _read(self) -> Any:
        """The tokenizer as llguidance reads it. Raises RequestError."""
        library = _llguidance()
        eos = sorted(self.eos_ids)
        if not eos:
            raise RequestError("structured output needs a model with an end-of-sequence token")
        try:
            if hasattr(self._tokenizer, "tokens"):
                table = library.TokenizerWrapper(self._tokenizer)
                return library.LLTokenizer(table, n_vocab=self._vocab_size, eos_token=eos)
            from llguidance.hf import from_tokenizer

            return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=eos)
        except (ValueError, AttributeError, TypeError) as error:
            raise RequestError(
                f"structured output: llguidance cannot read this tokenizer: {_line(str(error))}"
            ) from None


class Matcher:
    """The grammar of one request."""

    def __init__(self, grammars: Grammars, make: Any) -> None:
        self._make, self._matcher = make, make()
        self._words = grammars.words
        self._read: list[int] = []  # what the matcher has read
        self.name, self.eos_ids = grammars.name, grammars.eos_ids

    def mask(self, request: Request, length: int) -> npt.NDArray[np.int32]:
        """[words]: which tokens may stand behind the request's first `length` ones, for
        `llm42::apply_token_mask`. Where the output may end, every token that ends the request may come too.

        Raises ValueError where the grammar leaves nothing.
        """
        from llguidance.numpy import fill_next_token_bitmask

        self._seek(request.token_slice(request.prompt_len, length))
        mask = np.zeros((1, self._words), np.int32)
        accepting = self._matcher.is_accepting()
        fill_next_token_bitmask(self._matcher, mask, 0)
        if self._matcher.is_error() or not mask.any():
            why = _line(self._matcher.get_error()) or "it has no token for what must come"
            self._forget()
            raise ValueError(f"the grammar allows no token after {length - request.prompt_len}: {why}")
        if accepting:
            words: npt.NDArray[np.uint32] = mask.view(np.uint32)[0]
            for token in request.stop_ids:
                words[token // 32] |= np.uint32(1 << token % 32)
        return mask[0]

    def permits(self, request: Request, length: int, token: int) -> bool:
        """Whether `token` may stand there: what the mask says of it, in a fraction of the time."""
        try:
            self._seek(request.token_slice(request.prompt_len, length))
        except ValueError:
            return False  # the mask will say why
        if token in request.stop_ids and self._matcher.is_accepting():
            return True
        return token not in self.eos_ids and self._matcher.validate_tokens([token]) == 1

    def allowed(self, request: Request, draft: Sequence[int]) -> list[int]:
        """The beginning of `draft` that may follow committed + proposed tokens, without one that ends."""
        end = next((i for i, token in enumerate(draft) if token in request.stop_ids), len(draft))
        try:
            self._seek(request.token_slice(request.prompt_len, request.num_tokens))
            return list(draft[: self._matcher.validate_tokens(list(draft[:end]))])
        except ValueError:
            return []  # the row itself will say why

    def _seek(self, tokens: list[int]) -> None:
        """Read exactly `tokens`. Raises ValueError where the grammar does not allow them."""
        same = len(self._read)
        if tokens[:same] != self._read:
            pairs = zip(self._read, tokens, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(same, len(tokens)))
        if same < len(self._read):
            if self._matcher.rollback(len(self._read) - same):
                del self._read[same:]
            else:
                self._forget()
                same = 0
        if same < len(tokens):
            self._read = list(tokens)
            if not self._matcher.consume_tokens(tokens[same:]):
                why = _line(self._matcher.get_error())
                self._forget()
                raise ValueError(f"the grammar does not allow what came out: {why}")

    def _forget(self) -> None:
        """An error does not leave a matcher."""
        self._matcher, self._read = self._make(), []


def wanted(params: SamplingParams) -> tuple[str, Any]:
    """Which of `KINDS` the parameters ask for, and its value."""
    return next((kind, getattr(params, kind)) for kind in KINDS if getattr(params, kind) is not None)


def check_structured(params: SamplingParams) -> None:
    """Raises RequestError for what cannot be a grammar; a schema becomes its text."""
    given = [kind for kind in KINDS if getattr(params, kind) is not None]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} exclude each other")
    schema = params.json_schema
    if schema is not None and not isinstance(schema, str):
        try:
            schema = json.dumps(schema, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise RequestError(f"json_schema is no JSON: {error}") from None
        object.__setattr__(params, "json_schema", schema)
    for kind in ("regex", "grammar", "structured_by"):
        value = getattr(params, kind)
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{kind} must be a string, not {type(value).__name__}")
    choice = params.choice
    if choice is not None:
        if isinstance(choice, str) or not isinstance(choice, Sequence):
            raise RequestError("choice must be a list of strings")
        if not choice or any(not isinstance(text, str) or not text for text in choice):
            raise RequestError("choice must hold non-empty strings")
        object.__setattr__(params, "choice", tuple(choice))


def _source(library: Any, kind: str, text: Any) -> str:
    """The grammar as llguidance takes it. Raises ValueError."""
    make = library.LLMatcher
    if kind == "json_schema":
        source: str = make.grammar_from_json_schema(text)
        return source
    if kind == "regex":
        source = make.grammar_from_regex(text)
        return source
    if kind == "choice":
        text = "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in text)
    source = make.grammar_from_lark(text)
    return source


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise RequestError(
            "structured output needs the package llguidance: pip install 'llm42c[structured]'"
        ) from None
    return llguidance


def _line(text: str) -> str:
    """The first lines of a message, as one short line."""
    text = " ".join(text.partition("<state>")[0].split())
    return text if len(text) <= 200 else f"{text[:197]}..."
