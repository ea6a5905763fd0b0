"""The state of a request as a value: another engine of the same contract continues it to the same bits.

It holds what was asked and what is committed; everything else follows from these. The committed tokens are a
draft to the other engine, whose log-probs have to come again, bit for bit.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from llm42c.errors import Llm42Error, RequestError, StateError
from llm42c.runtime import sealed
from llm42c.runtime.asked import params_from_json, params_to_json, require_portable, resolved_params
from llm42c.runtime.contract import Contract
from llm42c.runtime.outputs import Limit
from llm42c.runtime.processors import Decode, TextState
from llm42c.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from llm42c.runtime.request import Request

KIND, VERSION = "llm42_state", 1


@dataclass(frozen=True)
class RequestState:
    """`params` are resolved. Log-probs are exact float32 values, one for each token."""

    contract: Contract
    prompt: list[int]
    params: SamplingParams
    limited_by: Limit
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @staticmethod
    def of(contract: Contract, request: Request) -> RequestState:
        """Raises RequestError for ordinary requests and for logits processors."""
        if not request.deterministic or request.forced is not None:
            raise RequestError(f"only a deterministic request has a state; {request.id} is none")
        require_portable(request.params, "a state")
        return RequestState(
            contract,
            request.history.tokens[: request.prompt_len],
            resolved_params(request),
            request.limited_by,
            request.outputs,
            list(request.history.logprobs),
        )

    def to_json(self) -> str:
        """One line of canonical JSON (:mod:`llm42c.runtime.sealed`)."""
        body = {
            "contract": json.loads(self.contract.to_json()),
            "contract_hash": self.contract.hash,
            "prompt": self.prompt,
            "params": params_to_json(self.params, form=True),
            "limited_by": self.limited_by,
            "tokens": self.tokens,
            "logprobs": list(map(bits, self.logprobs)),
        }
        return sealed.seal(KIND, VERSION, body)

    @staticmethod
    def from_json(text: str) -> RequestState:
        """The inverse of :meth:`to_json`. Raises StateError for what is no state, or was edited."""
        values = sealed.unseal(text, KIND, VERSION, "state", StateError)
        try:
            state = RequestState(
                Contract.from_json(json.dumps(values["contract"])),
                values["prompt"],
                params_from_json(values["params"]),
                values["limited_by"],
                values["tokens"],
                list(map(from_bits, values["logprobs"])),
            )
            same = text.removesuffix("\n") == state.to_json() and state._is_sound()
        except (Llm42Error, ValueError, TypeError, KeyError, AttributeError, struct.error):
            same = False
        if not same:
            raise StateError("damaged: the state is not as it was written")
        return state

    def _is_sound(self) -> bool:
        return len(self.tokens) == len(self.logprobs) and self.limited_by in get_args(Limit)

    def hand_over(self, request: Request, decode: Decode | None) -> None:
        """Let `request`, submitted with the state's prompt and params and nothing run, be a continuation:
        what the state holds counts as delivered, and has to come again."""
        delivery = request.delivery
        request.limited_by = self.limited_by
        request.resumed = delivery.outputs = len(self.tokens)
        delivery.promised = dict(enumerate(zip(self.tokens, self.logprobs, strict=True)))
        if decode is not None and self.params.detokenize:
            delivery.characters = TextState(decode, self.params.stop).restart(self.tokens).safe_length()


def bits(logprob: float) -> str:
    """8 hex digits: the bits of a float32."""
    return struct.pack(">f", logprob).hex()


def from_bits(digits: str) -> float:
    """The inverse. Raises ValueError or struct.error."""
    value: float = struct.unpack(">f", bytes.fromhex(digits))[0]
    return value
