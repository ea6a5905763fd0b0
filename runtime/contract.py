"""The contract: everything that the bits of a deterministic request depend on besides the request itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass, field
from typing import Any

import torch

from llm42c.device import Identity
from llm42c.errors import ContractMismatchError
from llm42c.packed import PackedModel
from llm42c.runtime.config import EngineConfig


@dataclass(frozen=True)
class Contract:
    """A value that can be printed, hashed and compared. Same hash, same bits."""

    weights: str  # digest of the weights
    dtype: str
    graph: str  # digest of the verifier graph
    verify_tokens: int
    verify_seqs: int
    verify_rows: int
    page_size: int
    kernels: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    isa: str = ""  # instruction set, or GPU model
    threads: int = 1
    tp_size: int = 1

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Contract:
        return Contract(**json.loads(text))

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
        """Raise ContractMismatchError unless `wanted` (a hash, or a contract) is this contract."""
        if isinstance(wanted, Contract):
            if wanted != self:
                raise ContractMismatchError(
                    "the request pins another contract: " + "; ".join(wanted.diff(self))
                )
        elif wanted != self.hash:
            raise ContractMismatchError(f"the request pins contract {wanted}, this engine has {self.hash}")


def engine_contract(
    verifier: PackedModel,
    config: EngineConfig,
    *,
    weights: str = "",
    kernels: dict[str, str] | None = None,
    tp_size: int = 1,
    gpu: Identity | None = None,
) -> Contract:
    """The contract of an engine that commits what `verifier` computes on this machine, or on its `gpu`."""
    versions = {"torch": torch.__version__, "machine": platform.machine()}
    isa, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    if gpu is not None:  # neither the CPU's instructions nor its threads compute anything there
        isa, threads = gpu.isa, 1
    return Contract(
        weights=weights,
        dtype=str(verifier.dtype).removeprefix("torch."),
        graph=verifier.digest,
        verify_tokens=config.verify_tokens,
        verify_seqs=config.verify_seqs,
        verify_rows=config.rows,
        page_size=config.page_size,
        kernels={**(kernels or {}), **(gpu.kernels if gpu else {})},
        versions={**versions, **(gpu.versions if gpu else {})},
        isa=isa,
        threads=threads,
        tp_size=tp_size,
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
