"""Specialisations of the attention kernels: what is fixed when their text is emitted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llm42c.codegen.target import Target

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
HEAD_DIMS = (64, 80, 96, 128, 256)
SCHEDULERS = ("tickets", "persistent", "partition")


class SpecError(ValueError):
    """A specialisation that no kernel is emitted for."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class AttentionSpec:
    """One attention kernel.

    ``rows`` and ``decode_rows`` are the M of the prefill and of the decode tile; a row is one (token, query
    head) of one KV head, so a tile of ``rows`` holds ``rows // group`` tokens. With ``uniform`` the decode
    role uses the prefill tile too (``decode_rows`` then only says how many rows a sequence may have to be
    split): a row's bits are the same in every role. Without it the role is a function of the number of the
    request's tokens in the call, and so are the bits. ``split`` is the number of absolute positions that
    are reduced together.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page: int
    dtype: str
    window: int = 0
    softcap: bool = False
    sinks: bool = False
    scheduler: str = "persistent"
    uniform: bool = True
    rows: int = 64
    decode_rows: int = 16
    keys: int = 64
    split: int = 512
    warps: int = 4
    stages: int = 2
    smid: bool = True  # the hardware register; else program number modulo ``sms``
    sms: int = 132

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype}")
        if self.head_dim not in HEAD_DIMS:
            raise SpecError(f"head_dim must be one of {HEAD_DIMS}, not {self.head_dim}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise SpecError(f"{self.kv_heads} KV heads do not divide {self.heads} query heads")
        if self.page % 16 or not 16 <= self.page <= 256:
            raise SpecError(f"page must be a multiple of 16 from 16 to 256, not {self.page}")
        if self.scheduler not in SCHEDULERS:
            raise SpecError(f"scheduler must be one of {', '.join(SCHEDULERS)}, not {self.scheduler}")
        if self.split % self.keys:
            raise SpecError(f"a split of {self.split} is no multiple of {self.keys} keys")
        for name in ("rows", "decode_rows", "keys"):
            if getattr(self, name) != power_of_two(getattr(self, name)) or getattr(self, name) < 16:
                raise SpecError(f"{name} must be a power of two from 16, not {getattr(self, name)}")
        if self.group > min(self.rows, self.decode_rows):
            raise SpecError(f"{self.group} query heads of a KV head need tiles of as many rows")
        if self.window < 0:
            raise SpecError(f"window must not be negative, got {self.window}")

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def decode_tokens(self) -> int:
        """A sequence with at most this many rows in a call is split over its keys."""
        return self.decode_rows // self.group

    def constants(self) -> dict[str, int | bool | str]:
        """What every file of this specialisation begins with."""
        return {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "DIM": power_of_two(self.head_dim),
            "PAGE": self.page,
            "SPLIT": self.split,
            "WINDOW": self.window,
            "DECODE_ROWS": self.decode_rows,
            "PREFILL_TOKENS": self.rows // self.group,
            "DECODE_TOKENS": self.decode_tokens,
        }

    def subject(self) -> str:
        """The specialisation in words."""
        return (
            f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, pages of {self.page}, "
            f"{DTYPES[self.dtype]}, {self.scheduler}"
        )


def default_spec(
    target: Target,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    dtype: str,
    window: int = 0,
    softcap: bool = False,
    sinks: bool = False,
    scheduler: str = "persistent",
    uniform: bool = True,
) -> AttentionSpec:
    """The tiles for a target: chosen so that nothing spills, checked ahead of time by tests."""
    group = max(1, heads // max(kv_heads, 1))
    decode_rows = max(16, power_of_two(group))
    rows, keys, warps, stages = tiles(target, head_dim, dtype)
    return AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page=page,
        dtype=dtype,
        window=window,
        softcap=softcap,
        sinks=sinks,
        scheduler=scheduler,
        uniform=uniform,
        rows=max(rows, decode_rows),
        decode_rows=decode_rows,
        keys=keys,
        warps=warps,
        stages=stages,
        smid=target.kind == "cuda",
        sms=target.count("sms", 132),
    )


def tiles(target: Target, head_dim: int, dtype: str) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of the attention tiles."""
    wide = head_dim > 128
    if dtype == "float32":  # no matrix instructions: everything lives in registers
        return (16, 16, 8, 1) if wide else (16, 16, 4, 1)
    if target.kind == "hip":
        return 64, 32, 4, 1
    if target.capability >= 90:
        return (64, 32, 8, 2) if wide else (64, 64, 4, 2)
    if wide:
        return 32, 32, 8, 1
    return (32, 32, 4, 2) if head_dim > 64 else (64, 32, 4, 2)


def with_scheduler(spec: AttentionSpec, scheduler: str) -> AttentionSpec:
    return dataclasses.replace(spec, scheduler=scheduler)
