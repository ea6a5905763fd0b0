"""What a request asks for, resolved: nothing is left to a default of an engine or of a prompt.

As JSON it stands in receipts and in states of requests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm42c.errors import RequestError
from llm42c.runtime import sealed
from llm42c.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from llm42c.runtime.contract import Contract
    from llm42c.runtime.request import Request

FORM = ("logprobs", "detokenize", "include_stop")  # what shapes an output and decides no token
_NEVER = ("logits_processors", "ignore_eos")  # code; and what `stop_token_ids` say when they are resolved
_DECIDING = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name not in (*FORM, *_NEVER))


def require_portable(params: SamplingParams, what: str) -> None:
    """Raises RequestError for logits processors, naming `what` cannot hold them."""
    if params.logits_processors:
        raise RequestError(f"logits processors are code, which {what} cannot hold")


def resolved_params(request: Request) -> SamplingParams:
    """With a seed, a number of tokens, and every token id that ends the output."""
    return dataclasses.replace(
        request.params,
        max_tokens=request.limit - request.prompt_len,
        seed=request.seed,
        stop_token_ids=tuple(sorted(request.stop_ids)),
        ignore_eos=True,
        structured_by=None if request.grammar is None else request.grammar.name,
    )


def params_to_json(params: SamplingParams, form: bool = False) -> dict[str, Any]:
    """What decides tokens; with `form` also what shapes the output."""
    values = {name: getattr(params, name) for name in (*_DECIDING, *(FORM if form else ()))}
    bias = values["logit_bias"]
    return values | {"logit_bias": None if bias is None else sorted(map(list, bias.items()))}


def params_from_json(values: dict[str, Any]) -> SamplingParams:
    """The inverse, of resolved parameters. Raises RequestError, KeyError, TypeError or ValueError."""
    bias = values["logit_bias"]
    bias = None if bias is None else dict(bias)
    known = {name: values[name] for name in _DECIDING} | {n: values[n] for n in FORM if n in values}
    return SamplingParams(**known | {"logit_bias": bias}, ignore_eos=True)


class Chain:
    """Digests over what came out: each of the one before, the token, and the bits of its log-prob (float32).

    The first follows a digest of what was asked.
    """

    def __init__(self, contract: Contract, prompt: Sequence[int], params: SamplingParams) -> None:
        asked = {"contract": contract.hash, "prompt": list(prompt), "params": params_to_json(params)}
        self._link = hashlib.blake2b(sealed.canonical(asked).encode(), digest_size=8).digest()

    def add(self, token: int, logprob: float) -> str:
        """16 hex digits."""
        data = self._link + struct.pack("<qf", token, logprob)
        self._link = hashlib.blake2b(data, digest_size=8).digest()
        return self._link.hex()

    def links(self, tokens: Sequence[int], logprobs: Sequence[float]) -> list[str]:
        return [self.add(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]
