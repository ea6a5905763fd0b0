"""Formats of quantised weights: what stands in a file, and the one packed layout of each.

A weight [N, K] is integers with a scale, and some formats a minimum, for every group along k::

    w[n, k] = scale[n, g] · (q[n, k] - offset) + minimum[n, g]          # g = k // group

A *block* is what a file stores together: K is a multiple of its length. :func:`split` reads the blocks of a
file into :class:`Values`; :func:`pack` lays these out as ``cpu/kernels/quant_formats.h`` says, in panels of
sixteen columns, which every target reads whose ``packing`` says nothing else, and :func:`unpack` is its exact
inverse. All of it only moves bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

COLUMNS = 16  # of a panel
STEP = 32  # values of k whose integers stand together in a panel, and that share a scale of x


class FormatError(ValueError):
    """A quantised weight that cannot be read."""


@dataclass(frozen=True)
class Values:
    """A weight's numbers. Scale of a group: ``outer``, times ``inner`` where there is one."""

    q: Tensor  # [N, K] uint8
    outer: Tensor  # [N, K / block] fp16 or fp32
    outer_minimum: Tensor | None = None
    inner: Tensor | None = None  # [N, K / group] uint8 or int8
    inner_minimum: Tensor | None = None  # what is taken away; ``outer_minimum`` is added where there is none

    def rows(self, index: Tensor) -> Values:
        """Those of the weight's rows."""
        others = (self.outer_minimum, self.inner, self.inner_minimum)
        return Values(self.q[index], self.outer[index], *(None if x is None else x[index] for x in others))

    def scale(self, group: int) -> Tensor:
        """[N, K / group] in fp32, exact."""
        return _times(self.outer, self.inner, self.q.shape[1] // group)

    def minimum(self, group: int) -> Tensor | None:
        """[N, K / group] in fp32, exact: what is added."""
        if self.outer_minimum is None:
            return None
        found = _times(self.outer_minimum, self.inner_minimum, self.q.shape[1] // group)
        return found if self.inner_minimum is None else 0.0 - found


def _times(outer: Tensor, inner: Tensor | None, groups: int) -> Tensor:
    wide = outer.float().repeat_interleave(groups // max(1, outer.shape[1]), 1)
    return wide if inner is None else wide * inner.float()


@dataclass(frozen=True)
class Format:
    """``bits`` of an integer; ``block`` values in ``bytes`` of a file; ``scales`` as in quant_formats.h."""

    name: str
    bits: int
    offset: int
    block: int
    group: int
    bytes: int
    scales: Literal["half", "super", "signed super", "float"]
    has_minimum: bool
    read: Callable[[Tensor], Values]  # of blocks [N, K / block, bytes]

    @property
    def outer_dtype(self) -> torch.dtype:
        return torch.float32 if self.scales == "float" else torch.float16

    @property
    def inner_dtype(self) -> torch.dtype | None:
        return {"super": torch.uint8, "signed super": torch.int8}.get(self.scales)

    @property
    def panel_bytes(self) -> int:
        """Of a block of a panel."""
        outer = self.outer_dtype.itemsize
        inner = 0 if self.inner_dtype is None else self.block // self.group
        return COLUMNS * ((outer + inner) * (1 + self.has_minimum) + self.block * self.bits // 8)


def format_of(name: str) -> Format:
    """Raises FormatError for a format that no kernel reads."""
    if name not in FORMATS:
        raise FormatError(f"no kernel reads weights of format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def split(blocks: Tensor, name: str) -> Values:
    """blocks: [N, bytes of a row] uint8, as a file has them. Raises FormatError: rows of another length, or
    scales that are no numbers."""
    form = format_of(name)
    if blocks.dim() != 2 or blocks.dtype != torch.uint8 or blocks.shape[1] % form.bytes:
        got = f"{tuple(blocks.shape)} of {blocks.dtype}"
        raise FormatError(f"expected rows of {form.bytes} bytes a block of {name}, got {got}")
    values = form.read(blocks.reshape(len(blocks), -1, form.bytes))
    for outer in (values.outer, values.outer_minimum):
        if outer is not None and not outer.isfinite().all():
            raise FormatError(f"scales of {name} hold NaN or infinity: the file is damaged")
    return values


def row_bytes(name: str, k: int) -> int:
    """Of a row of k values in a file. Raises FormatError if no whole number of blocks holds them."""
    form = format_of(name)
    if k % form.block:
        raise FormatError(f"rows of {k} values are no multiple of the {form.block} of a block of {name}")
    return k // form.block * form.bytes


def dequantise(values: Values, name: str) -> Tensor:
    """[N, K] in fp32: the product and the sum are rounded, each once."""
    form = format_of(name)
    whole = values.q.float() - form.offset
    whole *= values.scale(form.group).repeat_interleave(form.group, 1)
    minimum = values.minimum(form.group)
    return whole if minimum is None else whole + minimum.repeat_interleave(form.group, 1)


def pack(values: Values, name: str) -> Tensor:
    """[ceil(N / 16), K / block, panel_bytes] uint8; columns past N are zeros."""
    form = format_of(name)
    n, k = values.q.shape
    panels, blocks = -(-n // COLUMNS), k // form.block

    def columns(x: Tensor, *inner: int) -> Tensor:  # [N, …] → [P, 16, B, *inner]
        padded = x.new_zeros(panels * COLUMNS, x.shape[1])
        padded[:n] = x
        return padded.view(panels, COLUMNS, blocks, *inner)

    parts = []
    for outer in (values.outer, values.outer_minimum):
        if outer is not None:
            parts.append(columns(outer).transpose(1, 2).contiguous().view(torch.uint8))
    for scales in (values.inner, values.inner_minimum):
        if scales is not None:
            groups = columns(scales.view(torch.uint8), -1)  # [P, 16, B, G]
            parts.append(groups.permute(0, 2, 3, 1).flatten(2))
    units = columns(values.q, -1, 8, 4).permute(0, 2, 3, 4, 1, 5).flatten(4)  # [P, B, S, 8, 64]
    parts.append(_fold(units, form.bits).reshape(panels, blocks, -1))
    return torch.cat(parts, 2)


def unpack(packed: Tensor, name: str, n: int) -> Values:
    """The exact inverse of :func:`pack`."""
    form = format_of(name)
    panels, blocks, _ = packed.shape
    at = 0

    def take(count: int) -> Tensor:
        nonlocal at
        at += count
        return packed[:, :, at - count : at]

    def outer() -> Tensor:
        part = take(COLUMNS * form.outer_dtype.itemsize).contiguous().view(form.outer_dtype)
        return part.transpose(1, 2).reshape(-1, blocks)[:n]

    def inner() -> Tensor | None:
        if form.inner_dtype is None:
            return None
        part = take(COLUMNS * form.block // form.group).view(panels, blocks, -1, COLUMNS)
        return part.permute(0, 3, 1, 2).reshape(panels * COLUMNS, -1)[:n].view(form.inner_dtype)

    outers = outer(), outer() if form.has_minimum else None
    inners = inner(), inner() if form.has_minimum else None
    rest = take(packed.shape[2] - at).reshape(panels, blocks, form.block // STEP, -1)
    units = _unfold(rest, form.bits).unflatten(-1, (COLUMNS, 4))  # [P, B, S, 8, 16, 4]
    q = units.permute(0, 4, 1, 2, 3, 5).reshape(panels * COLUMNS, -1)[:n]
    return Values(q.contiguous(), *outers, *inners)


def _fold(units: Tensor, bits: int) -> Tensor:
    """[…, 8, 64] integers → […, bytes]: nibbles of unit u and u + 4 in a byte, then the bits above."""
    if bits == 8:
        return units.flatten(-2)
    low = units & 15
    parts = [(low[..., :4, :] | (low[..., 4:, :] << 4)).flatten(-2)]
    if bits > 4:
        width = bits - 4
        above = (units >> 4).unflatten(-2, (-1, 8 // width))  # [..., width, units in a byte, 64]
        moved = [above[..., j, :] << (width * j) for j in range(8 // width)]
        parts.append(torch.stack(moved).sum(0, dtype=torch.uint8).flatten(-2))
    return torch.cat(parts, -1)


def _unfold(folded: Tensor, bits: int) -> Tensor:
    """The exact inverse of :func:`_fold`."""
    if bits == 8:
        return folded.unflatten(-1, (8, 64))
    pairs = folded[..., :256].unflatten(-1, (4, 64))
    units = torch.cat([pairs & 15, pairs >> 4], -2)
    if bits > 4:
        width = bits - 4
        above = folded[..., 256:].unflatten(-1, (width, 64))
        moved = [(above >> (width * j)) & ((1 << width) - 1) for j in range(8 // width)]
        units = units | (torch.stack(moved, -2).flatten(-3, -2) << 4)
    return units


def _half(blocks: Tensor, at: int) -> Tensor:
    """fp16 at byte ``at`` of every block: [N, B]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(bytes_: Tensor) -> Tensor:
    """[…, 16 · steps] → […, steps, 32]: the low nibbles are the first half of a step."""
    pairs = bytes_.unflatten(-1, (-1, 16))
    return torch.cat([pairs & 15, pairs >> 4], -1)


def _bits(bytes_: Tensor) -> Tensor:
    """[…, n] → […, 8 n]: the lowest bit first."""
    return ((bytes_.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)


def _flat(q: Tensor) -> Tensor:
    return q.reshape(len(q), -1)


def _read_q8_0(blocks: Tensor) -> Values:
    return Values(_flat(blocks[..., 2:] ^ 128), _half(blocks, 0))


def _read_q4_0(blocks: Tensor) -> Values:
    return Values(_flat(_nibbles(blocks[..., 2:])), _half(blocks, 0))


def _read_q4_1(blocks: Tensor) -> Values:
    return Values(_flat(_nibbles(blocks[..., 4:])), _half(blocks, 0), _half(blocks, 2))


def _read_q5_0(blocks: Tensor) -> Values:
    q = _nibbles(blocks[..., 6:]).flatten(-2) | (_bits(blocks[..., 2:6]) << 4)
    return Values(_flat(q), _half(blocks, 0))


def _read_q5_1(blocks: Tensor) -> Values:
    q = _nibbles(blocks[..., 8:]).flatten(-2) | (_bits(blocks[..., 4:8]) << 4)
    return Values(_flat(q), _half(blocks, 0), _half(blocks, 2))


def _read_i4(blocks: Tensor) -> Values:
    header = blocks[..., :8].contiguous().view(torch.float32)
    return Values(_flat(_nibbles(blocks[..., 8:])), header[..., 0], header[..., 1])


def join_i4(q: Tensor, scale: Tensor, minimum: Tensor, group: int) -> Tensor:
    """q: [N, K] of four bits, scale and minimum: [N, K / group] fp32 → blocks of ``i4_<group>``."""
    header = torch.stack([scale, minimum], -1).float().contiguous().view(torch.uint8)  # [N, G, 8]
    low, high = q.unflatten(1, (-1, group // STEP, 2, STEP // 2)).unbind(3)
    return torch.cat([header, (low | (high << 4)).flatten(2)], 2).flatten(1)


def _read_k(blocks: Tensor, high: Tensor | None, low: Tensor) -> Values:
    """Q4_K and Q5_K: eight groups of 32, scales and minima of six bits in twelve bytes."""
    s = blocks[..., 4:16]
    a, b, c = s[..., :4], s[..., 4:8], s[..., 8:]
    scales = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], -1)
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], -1)
    pairs = low.unflatten(-1, (4, 32))  # bytes of two groups
    q = torch.stack([pairs & 15, pairs >> 4], -2).flatten(-3, -2)  # [N, B, 8, 32]
    if high is not None:  # bit g of byte i is that of element i of group g
        q = q | (((high.unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1) << 4)
    return Values(_flat(q), _half(blocks, 0), _half(blocks, 2), _flat(scales), _flat(minima))


def _read_q4_k(blocks: Tensor) -> Values:
    return _read_k(blocks, None, blocks[..., 16:])


def _read_q5_k(blocks: Tensor) -> Values:
    return _read_k(blocks, blocks[..., 16:48], blocks[..., 48:])


def _read_q6_k(blocks: Tensor) -> Values:
    low = blocks[..., :128].unflatten(-1, (2, 2, 32))  # [half, which, 32]
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    nibbles = torch.cat([low & 15, low >> 4], -2)  # [half, quarter, 32]
    above = (high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]) & 3
    inner = _flat(blocks[..., 192:208]).contiguous().view(torch.int8)
    return Values(_flat(nibbles | (above << 4)), _half(blocks, 208), inner=inner)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("q8_0", 8, 128, 32, 32, 34, "half", False, _read_q8_0),
        Format("q4_0", 4, 8, 32, 32, 18, "half", False, _read_q4_0),
        Format("q4_1", 4, 0, 32, 32, 20, "half", True, _read_q4_1),
        Format("q5_0", 5, 16, 32, 32, 22, "half", False, _read_q5_0),
        Format("q5_1", 5, 0, 32, 32, 24, "half", True, _read_q5_1),
        Format("q4_k", 4, 0, 256, 32, 144, "super", True, _read_q4_k),
        Format("q5_k", 5, 0, 256, 32, 176, "super", True, _read_q5_k),
        Format("q6_k", 6, 32, 256, 16, 210, "signed super", False, _read_q6_k),
        *(Format(f"i4_{g}", 4, 0, g, g, 8 + g // 2, "float", True, _read_i4) for g in (32, 64, 128)),
    )
}
"""By name. ``i4_<group>`` is what checkpoints of four bits become whose scales an fp16 does not hold."""
