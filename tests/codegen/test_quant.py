"""Formats of quantised weights: their numbers are the ``gguf`` package's, and packing only moves bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm42c.codegen import quant
from llm42c.codegen.cpu import build

gguf: Any = pytest.importorskip("gguf")
IN_FILES = [name for name in quant.FORMATS if not name.startswith("i4_")]
# Where the fp16 scales stand in a block.
SCALES = {"q6_k": [208], **{name: [0, 2] for name in ("q4_1", "q5_1", "q4_k", "q5_k")}}


def random_blocks(name: str, n: int = 40, blocks: int = 4, seed: int = 0) -> Tensor:
    """Blocks of any bits, but for scales, which are numbers."""
    form = quant.format_of(name)
    g = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 256, (n, blocks, form.bytes), dtype=torch.uint8, generator=g)
    if form.scales == "float":
        found[..., :8] = torch.randn(n, blocks, 2, generator=g).view(torch.uint8)
    for at in SCALES.get(name, [0]) if form.scales != "float" else ():
        found[..., at + 1] &= 0b10111011  # an exponent below the largest
    return found.view(n, -1)


def same(a: quant.Values, b: quant.Values) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", IN_FILES)
def test_numbers_are_those_of_the_gguf_package(name: str) -> None:
    blocks = random_blocks(name)
    mine = quant.dequantise(quant.split(blocks, name), name)
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert torch.equal(mine, torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind)))
    assert gguf.GGML_QUANT_SIZES[kind] == (quant.format_of(name).block, quant.format_of(name).bytes)
    blocks[17, 40] ^= 16
    assert not torch.equal(mine, quant.dequantise(quant.split(blocks, name), name))


@pytest.mark.parametrize("n", [1, 16, 40])
@pytest.mark.parametrize("name", quant.FORMATS)
def test_panels_give_everything_back(name: str, n: int) -> None:
    values = quant.split(random_blocks(name, n), name)
    packed = quant.pack(values, name)
    form = quant.format_of(name)
    assert packed.shape == (-(-n // quant.COLUMNS), 4, form.panel_bytes)
    assert same(quant.unpack(packed, name, n), values)
    assert not same(quant.split(random_blocks(name, n, seed=1), name), values)


def test_four_bits_are_read_from_memory() -> None:
    """A panel takes no more than a file, but for the inner scales of six bits, which take eight."""
    for name in IN_FILES:
        form = quant.format_of(name)
        more = {"q4_k": 4, "q5_k": 4}.get(name, 0)
        assert form.panel_bytes == quant.COLUMNS * (form.bytes + more), name


def test_what_cannot_be_read_is_one_line() -> None:
    with pytest.raises(
        quant.FormatError, match="no kernel reads weights of format 'q2_k'; there are q8_0, q4_0"
    ):
        quant.format_of("q2_k")
    with pytest.raises(
        quant.FormatError, match="rows of 576 values are no multiple of the 256 of a block of q4_k"
    ):
        quant.row_bytes("q4_k", 576)
    blocks = random_blocks("q4_1")
    with pytest.raises(quant.FormatError, match="rows of 20 bytes a block"):
        quant.split(blocks[:, :-1], "q4_1")
    with pytest.raises(quant.FormatError, match="rows of 20 bytes a block"):
        quant.split(blocks.float(), "q4_1")
    blocks[3, 3] = 0b01111100  # infinity, as the minimum of a block
    blocks[3, 2] = 0
    with pytest.raises(quant.FormatError, match="scales of q4_1 hold NaN or infinity: the file is damaged"):
        quant.split(blocks, "q4_1")


def test_the_header_knows_the_same_formats() -> None:
    text = (build.SOURCE_DIR / "kernels" / "quant.cpp").read_text()
    assert all(f'("{name}")' in text for name in quant.FORMATS)
