"""Specialisations of the attention kernels: what is fixed when their text is emitted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llm42c.codegen.device import Device

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
HEAD_DIMS = (64, 80, 96, 128, 256)
SCHEDULERS = ("tickets", "persistent", "partition")
# Where keys and values lie: in the paged caches (keys transposed), in a pool of pages of tokens, or in
# packed rows of tokens.
LAYOUTS = ("cache", "pool", "rows")


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
    hoist: bool = False  # let the compiler keep what does not change from block to block in registers
    sm: str = "register"  # how a program learns its SM: register, program (number modulo ``sms``), table
    sms: int = 132
    layout: str = "cache"
    strides: tuple[int, ...] = ()  # of pages, tokens and heads, of keys, then of values, where not in caches

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype}")
        if self.head_dim not in HEAD_DIMS:
            raise SpecError(f"head_dim must be one of {HEAD_DIMS}, not {self.head_dim}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise SpecError(f"{self.kv_heads} KV heads do not divide {self.heads} query heads")
        if self.layout not in LAYOUTS:
            raise SpecError(f"layout must be one of {', '.join(LAYOUTS)}, not {self.layout}")
        if self.page % 16 or self.page < 16 or (self.layout == "cache" and self.page > 256):
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
        if len(self.strides) != (0 if self.layout == "cache" else 6):
            raise SpecError(f"{len(self.strides)} strides do not describe keys and values in {self.where()}")
        if self.layout == "pool" and max(self.strides[1], self.strides[4]) * self.page >= 1 << 31:
            raise SpecError("the tokens of a page lie too far apart")
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

    def decided(self, *names: str) -> dict[str, bool | int | str]:
        """Of the branches of ``kernels/pod_attention.py``, those called ``names``."""
        branches: dict[str, bool | int | str] = {
            "LAYOUT": self.layout,
            "ONE_PAGE": self.page % self.keys == 0,
            "CAPPED": self.softcap,
            "SCHEDULER": self.scheduler,
            "UNIFORM": self.uniform,
            "SM": self.sm,
        }
        return {name: branches[name] for name in names}

    def stride_constants(self) -> dict[str, int]:
        """What the text of the hybrid kernel calls the strides."""
        names = ("K_PAGE", "K_TOKEN", "K_HEAD", "V_PAGE", "V_TOKEN", "V_HEAD")
        named = dict(zip(names, self.strides, strict=False))
        return {n: s for n, s in named.items() if self.layout == "pool" or not n.endswith("PAGE")}

    def where(self) -> str:
        """The layout of keys in words."""
        pages = f"pages of {self.page}"
        return {"cache": pages, "pool": f"{pages} tokens", "rows": "packed rows"}[self.layout]

    def variants(self) -> tuple[AttentionSpec, ...]:
        """Itself and others with the same bits: instructions stand elsewhere, more or less is kept at hand.

        Over pools and packed rows, resident programs may also draw their items in the other way.
        """
        depths = (1, 2) if self.stages == 1 else (self.stages, 1)
        drawing = [self.scheduler]
        if self.layout != "cache" and self.scheduler != "tickets":
            drawing.append("partition" if self.scheduler == "persistent" else "persistent")
        forms = [(stages, hoist) for hoist in (self.hoist, not self.hoist) for stages in depths]
        return tuple(
            dataclasses.replace(self, stages=stages, hoist=hoist, scheduler=scheduler)
            for scheduler in drawing
            for stages, hoist in (*forms, (3, self.hoist))
        )

    def subject(self) -> str:
        """The specialisation in words."""
        return (
            f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, {self.where()}, "
            f"{DTYPES[self.dtype]}, {self.scheduler}"
        )


def default_spec(
    device: Device,
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
    layout: str = "cache",
    strides: tuple[int, ...] = (),
) -> AttentionSpec:
    """The tiles for a device: nothing spills in one of the :meth:`AttentionSpec.variants`.

    Tests check that ahead of time. The tiles do not depend on the scheduler or the layout: a row's bits must
    not. ``strides`` are by default those of contiguous tensors.
    """
    if layout != "cache" and not strides:
        strides = (page * kv_heads * head_dim, kv_heads * head_dim, head_dim) * 2
    group = max(1, heads // max(kv_heads, 1))
    decode_rows = max(16, power_of_two(group))
    rows, keys, warps, stages = tiles(device, head_dim, dtype, plain=not (window or softcap))
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
        sm="register" if device.kind == "cuda" else "program",
        sms=device.count("sms", 132),
        layout=layout,
        strides=strides,
    )


def tiles(device: Device, head_dim: int, dtype: str, plain: bool = True) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of the attention tiles; not ``plain``: with a window or a soft-cap."""
    wide = head_dim > 128
    if dtype == "float32":  # no matrix instructions: everything lives in registers
        return (16, 16, 8, 1) if wide else (16, 16, 4, 1)
    if device.kind == "hip":
        return 64, 32, 4, 1
    if wide:
        return (64, 32, 8, 2) if device.capability >= 100 else (32, 32, 8, 1)
    if device.capability >= 90:
        return (64, 64, 4, 2) if plain or head_dim <= 64 else (64, 32, 4, 2)
    return (32, 32, 4, 2) if head_dim > 64 else (64, 32, 4, 2)


def with_scheduler(spec: AttentionSpec, scheduler: str) -> AttentionSpec:
    return dataclasses.replace(spec, scheduler=scheduler)
