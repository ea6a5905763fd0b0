"""Chains of bf16 products, on all bit patterns: every instruction set gives what the simulator says."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.cpu import build
from llm42c.codegen.ops import registry

registry.load()
ops = torch.ops.llm42
LANES = 16
SOURCE = """
#include "kernels/element.h"
#include "kernels/parallel.h"
using namespace llm42;
// x: [groups, k], w: [groups, k / 2, 16] pairs -> out: [groups, 16], in fp32
extern "C" __attribute__((visibility("default")))
void chains(const bf16* x, const bf16x2* w, float* out, long groups, long k) {
  const FloatMode<kPairsByMode> mode;
  for (long g = 0; g < groups; g++)
    for (int lane = 0; lane < 16; lane += kLanes) {
      Vec acc = Vec::zero();
      for (long p = 0; p < k / 2; p++) {
        PairX kept[kPairSteps];
        keep_pairs(x + g * k + 2 * p, 2, kept);
        unrolled<kPairSteps>([&](auto step) {
          acc = fma(pair_factor(kept[step]), pair_factor<step>(w + (g * k / 2 + p) * 16 + lane), acc);
        });
      }
      acc.store(out + g * 16 + lane);
    }
}
"""
Inputs = tuple[Tensor, Tensor]  # x: [G, K], w: [G, 16, K], bf16


def runnable() -> list[str]:
    has = set(build.cpu_features().split())
    return [isa for isa in build.ISAS if build.NEEDS.get(isa, set()) <= has]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("chains")
    source = folder / "chains.cpp"
    source.write_text(SOURCE)
    found = {}
    for isa in runnable():
        flags = [*build.FLAGS, *build._ISA_FLAGS[isa], f"-I{build.SOURCE_DIR}", "-shared"]
        out = folder / f"{isa}.so"
        subprocess.run([build.Toolchain.find().compiler, *flags, str(source), "-o", out], check=True)
        found[isa] = ctypes.CDLL(str(out))
    return found


def run(library: ctypes.CDLL, x: Tensor, w: Tensor) -> Tensor:
    """→ [G, 16] fp32"""
    groups, k = x.shape
    pairs = w.unflatten(-1, (k // 2, 2)).flip(-1).transpose(1, 2).contiguous()  # the first in the high half
    out = torch.empty(groups, LANES)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x.contiguous(), pairs, out)]
    library.chains(*pointers, ctypes.c_long(groups), ctypes.c_long(k))
    return out


def patterns(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint16)).view(torch.bfloat16)


def every_pattern() -> Inputs:
    """Every bf16 number at every place of a chain of four, against any other."""
    g = np.random.default_rng(0)
    every = np.stack([g.permutation(2**16) for _ in range(4)], 1).reshape(-1, LANES, 4)
    return patterns(g.integers(0, 2**16, (len(every), 4))), patterns(every)


def specials() -> Inputs:
    """Zeros, denormals, least normal numbers, infinities, NaN and what gives all of them, each with each."""
    half = [0, 1, 0x7F, 0x80, 0x81, 0x1F80, 0x1FFF, 0x2000, 0x3F80, 0x3F81, 0x5F80, 0x7F00, 0x7F7F, 0x7F80]
    bits = np.array([*half, 0x7FC0, 0x7F81, *(b | 0x8000 for b in half), 0xFFC0, 0xFF81])
    x = np.stack(np.meshgrid(bits, bits, indexing="ij"), -1).reshape(-1, 2)
    w = np.stack(np.meshgrid(bits, bits, indexing="ij"), -1).reshape(-1, LANES, 2)
    return patterns(np.repeat(x, len(w), 0)), patterns(np.tile(w, (len(x), 1, 1)))


def near_denormals() -> Inputs:
    """Six products each about as large as the least normal number."""
    g = np.random.default_rng(1)
    sign = g.integers(0, 2, (20000, LANES, 6)) << 15
    x = (g.integers(58, 70, (20000, 6)) << 7) + g.integers(0, 128, (20000, 6))
    exponent = 126 - (x[:, None] >> 7) + g.integers(-26, 4, sign.shape)
    return patterns(x), patterns(sign + (exponent.clip(0, 254) << 7) + g.integers(0, 128, sign.shape))


def on_the_edge() -> Inputs:
    """2^-126 or a little more, then what leaves 2^-126 - 2^-151, where the rounding turns, or nearly so."""
    x, w = [], []
    for sign in (1.0, -1.0):
        for above in range(8):  # 2^-126 + above · 2^-133, both exact
            for back in range(-9, 10):
                first, second = 2.0**-63, 2.0**-70
                rest = -(above * 2.0**-133) / second, -(2.0**-151 + back * 2.0**-158) / second
                x += [[first, second, second, second]]
                w += [[[sign * v for v in (2.0**-63, above * 2.0**-63, *rest)]] * LANES]
    return torch.tensor(x, dtype=torch.float64).bfloat16(), torch.tensor(w, dtype=torch.float64).bfloat16()


CASES: dict[str, Callable[[], Inputs]] = {
    f.__name__: f for f in (every_pattern, specials, near_denormals, on_the_edge)
}


def bits(x: Tensor) -> Tensor:
    """One bit pattern for all NaN: no result shows which it is."""
    return torch.where(x.isnan(), 0x7FC00000, x.contiguous().view(torch.int32))


def simulated(x: Tensor, w: Tensor) -> Tensor:
    return simulate.chain(x[:, None], w)


@pytest.mark.parametrize("name", CASES)
def test_every_instruction_set_computes_the_chain_of_the_simulator(
    name: str, libraries: dict[str, ctypes.CDLL]
) -> None:
    x, w = CASES[name]()
    want = bits(simulated(x, w))
    assert {build.widest_isa(), "portable"} <= libraries.keys()
    for isa, library in libraries.items():
        assert torch.equal(bits(run(library, x, w)), want), isa


@pytest.mark.parametrize("name", CASES)
def test_the_inputs_reveal_what_happens_to_denormals(name: str) -> None:
    x, w = CASES[name]()
    kept = bits(simulate.chain(x[:, None].float(), w.float()))
    assert not torch.equal(bits(simulated(x, w)), kept)


def test_the_inputs_reveal_the_order_in_a_pair() -> None:
    x, w = near_denormals()
    swapped = [t.unflatten(-1, (3, 2)).flip(-1).flatten(-2) for t in (x, w)]
    assert (bits(simulated(x, w)) != bits(simulated(*swapped))).float().mean() > 0.05


def test_rounding_decides_before_the_exponent_ends() -> None:
    """2^-126 - 2^-150 is zero, though the nearest number with denormals is 2^-126; half as far, it is not."""
    x, w = on_the_edge()
    y = simulated(x, w).abs()
    kept = simulate.chain(x[:, None].float(), w.float()).abs()
    assert ((y == 0) & (kept == 2.0**-126)).any()
    assert (y == 2.0**-126).any()


def tiny(rows: int, columns: int, seed: int) -> Tensor:
    """Products of two of these are about as large as the least normal number; a few are anything."""
    g = np.random.default_rng(seed)
    shape = rows, columns
    number = (g.integers(0, 2, shape) << 15) + (g.integers(56, 72, shape) << 7) + g.integers(0, 128, shape)
    return patterns(np.where(g.random(shape) < 0.002, g.integers(0, 2**16, shape), number))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.integers(1, 110), st.integers(0, 10**6), st.integers(1, 4))
def test_products_of_any_shape(m: int, k: int, n: int, seed: int, threads: int) -> None:
    x, w = tiny(m, k, seed), tiny(n, k, seed + 1)
    want = simulate.linear(x, w, None).view(torch.int16)
    packed, before = ops.linear_pack(w), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [ops.linear(x, packed, None, n), ops.linear_dense(x, w, None)]
        found.append(ops.linear_dense(x, w.t().contiguous().t(), None))
    finally:
        torch.set_num_threads(before)
    for y in found:
        nan = y.isnan()
        assert torch.equal(y.view(torch.int16)[~nan], want[~nan])
        assert torch.equal(nan, simulate.linear(x, w, None).isnan())
    assert torch.equal(ops.linear_unpack(packed, n, k).view(torch.int16), w.view(torch.int16))


def test_a_row_is_the_same_among_any_number_of_rows() -> None:
    x, w = tiny(70, 577, 5), tiny(100, 577, 6)
    packed = ops.linear_pack(w)
    alone = torch.cat([ops.linear(row[None], packed, None, 100) for row in x]).view(torch.int16)
    for m in range(1, 71):
        assert torch.equal(ops.linear(x[:m], packed, None, 100).view(torch.int16), alone[:m])
    assert alone.unique().numel() > 100
