"""The contract: everything that the bits of a deterministic request depend on besides the request itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm42c.capture.packed import PackedModel
from llm42c.codegen.implementation import digest_of
from llm42c.codegen.ops.registry import orders_of
from llm42c.compile.computation import Computation
from llm42c.errors import ContractError, ContractMismatchError
from llm42c.runtime import processors
from llm42c.runtime.config import EngineConfig

# What turns logits into tokens, by name and version. A version is raised by whoever changes a bit of it.
RULES = {
    "noise": "philox4x32-10/1",  # of (seed, position, vocabulary index)
    "choice": "gumbel-max/1",  # of logits over temperature; equal scores go to the lowest index
    "filters": "top-k, top-p, min-p/1",
    "logprobs": "raw logits/1",
    "processing": "repetition, counts, bias, user, min-tokens/1",
    "seed": "prompt and distribution/1",  # of a request that names none
}
_SAMPLING = ("sample", "token_logprobs", "top_logprobs")


@dataclass(frozen=True)
class Contract:
    """A value that can be printed, hashed and compared. Same hash, same bits.

    ``machine`` is empty where every bit is decided by the other fields: on a CPU, in a graph of llm42's
    operators and exact calls. Otherwise it holds what the rest hangs on.
    """

    weights: str  # digest of the weights
    dtype: str
    graph: str  # digest of the verifier graph after the passes
    verify_tokens: int
    verify_seqs: int
    verify_rows: int
    page_size: int
    orders: dict[str, str] = field(default_factory=dict)  # of every operator that is called
    rules: dict[str, str] = field(default_factory=lambda: dict(RULES))
    implementation: dict[str, str] = field(default_factory=dict)  # digests of sources
    machine: dict[str, str] = field(default_factory=dict)
    target: str = "cpu"
    tp_size: int = 1
    quantisation: dict[str, int] = field(default_factory=dict)  # how many weights have which format

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Contract:
        """The inverse of :meth:`to_json`. Raises ContractError for another text."""
        try:
            values = json.loads(text)
            values.pop("hash", None)  # as `llm42 contract --json` prints it
            contract = Contract(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ContractError(f"this is no contract that this release of llm42 can read: {error}") from None
        if [f.name for f in dataclasses.fields(Contract) if f.name not in values]:
            raise ContractError("this is no contract that this release of llm42 can read: fields are missing")
        return contract

    @property
    def hash(self) -> str:
        """SHA-256 of `to_json`, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def diff(self, other: Contract) -> list[str]:
        """One line for each field that differs, `name: mine -> theirs`."""
        mine, theirs = _flat(dataclasses.asdict(self)), _flat(dataclasses.asdict(other))
        names = sorted(mine.keys() | theirs.keys())
        return [
            f"{n}: {mine.get(n, 'absent')} -> {theirs.get(n, 'absent')}"
            for n in names
            if mine.get(n) != theirs.get(n)
        ]

    def require(self, wanted: str | Contract) -> None:
        """Raise ContractMismatchError unless `wanted` is this contract: its hash, its JSON, or the value."""
        if isinstance(wanted, str) and wanted.lstrip().startswith("{"):
            wanted = Contract.from_json(wanted)
        if isinstance(wanted, Contract):
            if wanted != self:
                raise ContractMismatchError(
                    "the request pins another contract: " + "; ".join(wanted.diff(self))
                )
        elif wanted != self.hash:
            raise ContractMismatchError(
                f"the request pins contract {wanted}, this engine has {self.hash}; "
                "pin the contract's JSON (llm42 contract --json) to see the fields"
            )


def engine_contract(
    verifier: PackedModel,
    config: EngineConfig,
    *,
    weights: str = "",
    computation: Computation | None = None,
    tp_size: int = 1,
    quantisation: dict[str, int] | None = None,
) -> Contract:
    """The contract of an engine that commits what `verifier` computes, as `computation` describes it."""
    known = computation or Computation(graph=verifier.digest)
    implementation = dict(known.implementation)
    if computation is not None:
        implementation["rules"] = digest_of([Path(processors.__file__)])
    return Contract(
        weights=weights,
        dtype=str(verifier.dtype).removeprefix("torch."),
        graph=known.graph,
        verify_tokens=config.verify_tokens,
        verify_seqs=config.verify_seqs,
        verify_rows=config.rows,
        page_size=config.page_size,
        orders={**known.orders, **orders_of(_SAMPLING, known.target)},
        rules=dict(RULES),
        implementation=implementation,
        machine=known.machine,
        target=known.target,
        tp_size=tp_size,
        quantisation=quantisation or {},
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
