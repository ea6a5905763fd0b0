"""Which scheduler for which batch: a roofline of the two roles over what is known of the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm42c.codegen.device import Device
from llm42c.codegen.triton.spec import AttentionSpec

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_LAUNCH = 3e-6  # seconds that one more launch costs a stream, for weighing roles against each other


@dataclass(frozen=True)
class Composition:
    """A batch: tokens and mean keys of its prefills, sequences and mean keys of its decodes."""

    prefill_tokens: int = 0
    prefill_keys: int = 0
    decode_rows: int = 0
    decode_keys: int = 0


@dataclass(frozen=True)
class Choice:
    """A scheduler with its numbers. ``programs`` is the size of the grid, 0 for one program an item."""

    scheduler: str
    prefill_share: int
    decode_share: int
    programs: int
    reason: str


def times(c: Composition, spec: AttentionSpec, device: Device) -> tuple[float, float]:
    """Seconds of each role alone: prefill bound by arithmetic, decode by memory."""
    flops = 4.0 * c.prefill_tokens * c.prefill_keys * spec.heads * spec.head_dim
    moved = 2.0 * c.decode_rows * c.decode_keys * spec.kv_heads * spec.head_dim * _BYTES[spec.dtype]
    return flops / device.get("bf16_flops", 300e12), moved / device.get("memory_bandwidth", 1e12)


def choose(c: Composition, spec: AttentionSpec, device: Device, resident: int = 2) -> Choice:
    """The scheduler for a batch; ``resident`` programs fit on an SM.

    Pure batches run one role. Balanced ones share every SM by tickets in proportion to the time of the
    roles, so that both end together; one item a program while the grid is small, resident programs when
    there are more than four waves of items. Where one role dominates by more than 8 to 1, mixing on an SM
    has little to hide, and a partition with takeover keeps the tiles of a role together.
    """
    sms = device.count("sms", spec.sms)
    prefill, decode = times(c, spec, device)
    if not prefill or not decode:
        share = (1, 0) if prefill else (0, 1)
        return Choice("persistent", *share, sms * resident, "one role only")
    part = prefill / (prefill + decode)
    share = shares(part)
    balance = max(part, 1 - part) / min(part, 1 - part)
    if balance > 8:
        return Choice("partition", *share, sms * resident, f"one role takes {balance:.0f} times the other")
    items = spec.kv_heads * (
        math.ceil(c.prefill_tokens * spec.group / spec.rows)
        + c.decode_rows * math.ceil(max(c.decode_keys, 1) / spec.split)
    )
    if items <= 4 * sms * resident:
        return Choice("tickets", *share, 0, f"{items} items are at most four waves")
    return Choice("persistent", *share, sms * resident, f"{items} items are more than four waves")


def shares(part: float) -> tuple[int, int]:
    """Small integers in about the proportion ``part`` to ``1 - part``; each at least 1."""
    prefill = min(7, max(1, round(8 * part)))
    divisor = math.gcd(prefill, 8 - prefill)
    return prefill // divisor, (8 - prefill) // divisor
