"""A receipt: what a deterministic request asked for and got, as a line of JSON that another engine can check.

It holds no text and no log-probs, but a chain of digests over them: link i hashes link i - 1, token i and the
bits of its log-prob, and the first one everything that was asked. It is sealed, so that an edit anywhere
shows, and may be signed, so that whoever knows the key sees that nobody else made it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from llm42c.errors import Llm42Error, ReceiptError
from llm42c.runtime import sealed
from llm42c.runtime.asked import (
    Chain,
    params_from_json,
    params_to_json,
    require_portable,
    resolved_params,
)
from llm42c.runtime.contract import Contract
from llm42c.runtime.outputs import FinishReason
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.signing import is_signed

if TYPE_CHECKING:
    from llm42c.runtime.outputs import RequestOutput
    from llm42c.runtime.request import Request
    from llm42c.runtime.signing import Signer

KIND, VERSION = "llm42_receipt", 2


@dataclass(frozen=True)
class Receipt:
    """`params` are resolved: a seed, a number of tokens, and every token id that ends the output."""

    contract: Contract
    prompt: list[int]
    params: SamplingParams
    tokens: list[int]
    chain: list[str]  # a link for each token
    finish_reason: FinishReason
    stop_reason: int | str | None
    public_key: str | None = None  # of a signed one: Ed25519, in hex as the signature
    signature: str | None = None

    @staticmethod
    def of(contract: Contract, request: Request) -> Receipt:
        """The receipt of a request that has ended. Raises RequestError for logits processors."""
        require_portable(request.params, "a receipt")
        assert request.finish_reason is not None
        params = params_from_json(params_to_json(resolved_params(request)))
        prompt, tokens = request.history.tokens[: request.prompt_len], request.outputs
        chain = Chain(contract, prompt, params).links(tokens, request.history.logprobs)
        return Receipt(contract, prompt, params, tokens, chain, request.finish_reason, request.stop_reason)

    def signed(self, signer: Signer) -> Receipt:
        """The same with a signature of everything in it."""
        named = replace(self, public_key=signer.public_key, signature=None)
        return replace(named, signature=signer.sign(named._signed_bytes()))

    def to_json(self) -> str:
        """One line of canonical JSON (:mod:`llm42c.runtime.sealed`)."""
        body = self._body()
        return sealed.seal(
            KIND, VERSION, body if self.signature is None else body | {"signature": self.signature}
        )

    @staticmethod
    def from_json(text: str) -> Receipt:
        """The inverse of :meth:`to_json`. Raises ReceiptError for what is no receipt, or was edited."""
        values = sealed.unseal(text, KIND, VERSION, "receipt", ReceiptError)
        try:
            receipt = Receipt(
                Contract.from_json(json.dumps(values["contract"])),
                values["prompt"],
                params_from_json(values["params"]),
                values["tokens"],
                values["chain"],
                values["finish_reason"],
                values["stop_reason"],
                values.get("public_key"),
                values.get("signature"),
            )
            same = text.removesuffix("\n") == receipt.to_json()
        except (Llm42Error, ValueError, TypeError, KeyError, AttributeError):
            same = False
        if not same:
            raise ReceiptError("damaged: the receipt is not as it was written")
        return receipt

    def _body(self) -> dict[str, Any]:
        body = {
            "contract": json.loads(self.contract.to_json()),
            "contract_hash": self.contract.hash,
            "prompt": self.prompt,
            "params": params_to_json(self.params),
            "tokens": self.tokens,
            "chain": self.chain,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        return body if self.public_key is None else body | {"public_key": self.public_key}

    def _signed_bytes(self) -> bytes:
        return sealed.canonical({**self._body(), KIND: VERSION}).encode()


@dataclass(frozen=True)
class ReplayResult:
    """What came of a replay. `detail` says it in one line."""

    verdict: Literal["exact", "differs", "another contract", "damaged", "unsigned", "another key"]
    detail: str
    position: int | None = None  # of the first output that differs
    fields: tuple[str, ...] = ()  # of the contract, `name: of the receipt -> of the engine`


def signature_result(receipt: Receipt, public_key: str) -> ReplayResult | None:
    """Why the receipt is not one that the owner of `public_key` (in hex) has signed, if it is not.

    Raises ConfigError where signatures cannot be checked.
    """
    if receipt.signature is None or receipt.public_key is None:
        return ReplayResult("unsigned", "unsigned: the receipt has no signature")
    if receipt.public_key != public_key:
        return ReplayResult(
            "another key", f"another key: the receipt names {receipt.public_key}, and the file {public_key}"
        )
    if not is_signed(receipt._signed_bytes(), receipt.signature, public_key):
        return ReplayResult("damaged", "damaged: the signature is not one of this receipt")
    return None


def contract_result(receipt: Receipt, contract: Contract) -> ReplayResult | None:
    """Why an engine of `contract` cannot say anything about the receipt, if it cannot."""
    if receipt.contract == contract:
        return None
    fields = tuple(receipt.contract.diff(contract))
    return ReplayResult("another contract", "another contract: " + "; ".join(fields), fields=fields)


def compare(receipt: Receipt, output: RequestOutput) -> ReplayResult:
    """Whether `output`, of the request that the receipt describes, is what the receipt says."""
    chain = Chain(receipt.contract, receipt.prompt, receipt.params).links(output.token_ids, output.logprobs)
    both = zip(chain, receipt.chain, strict=False)
    position = next((i for i, (a, b) in enumerate(both) if a != b), min(len(chain), len(receipt.chain)))
    count = len(receipt.tokens)
    if chain == receipt.chain and output.token_ids == receipt.tokens and output.error is None:
        if (output.finish_reason, output.stop_reason) == (receipt.finish_reason, receipt.stop_reason):
            return ReplayResult("exact", f"exact: {count} tokens and their log-probs, bit for bit")
        why = f"it ended by {output.finish_reason}, and in the receipt by {receipt.finish_reason}"
    elif output.error is not None:
        why = output.error
    elif output.token_ids[position : position + 1] == receipt.tokens[position : position + 1]:
        why = "the same token with another log-prob, or after other ones"
    else:
        found, said = (t[position : position + 1] for t in (output.token_ids, receipt.tokens))
        why = f"{found or 'the end'}, and in the receipt {said or 'the end'}"
    return ReplayResult("differs", f"differs at token {position}: {why}", position)
