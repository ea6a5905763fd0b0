"""The vector header: accuracy of its functions, and equal bits on every instruction set."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm42c.codegen.cpu import build

FUNCTIONS = ("exp", "exp_nonpositive", "log", "neg_log1m", "tanh")
SOURCE = """
#include "vec/math.h"
using namespace llm42;
template <class F>
static void map(const float* in, float* out, long n, F f) {
  for (long i = 0; i < n; i += 16) f(V16::load(in + i)).store(out + i);
}
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void apply(int fn, const float* in, float* out, long n) {
  switch (fn) {
    case 0: return map(in, out, n, [](V16 x) { return exp(x); });
    case 1: return map(in, out, n, [](V16 x) { return exp_nonpositive(x); });
    case 2: return map(in, out, n, [](V16 x) { return log(x); });
    case 3: return map(in, out, n, [](V16 x) { return neg_log1m(x); });
    case 4: return map(in, out, n, [](V16 x) { return tanh(x); });
  }
}
EXPORT void sums(const float* in, float* out, long n) {
  for (long i = 0; i < n; i++) out[i] = i % 2 ? hmax(V16::load(in + 16 * i)) : hsum(V16::load(in + 16 * i));
}
EXPORT void to_bf16(const float* in, uint16_t* out, long n) {
  for (long i = 0; i < n; i += 16) V16::load(in + i).store((bf16*)out + i);
}
EXPORT void to_f16(const float* in, uint16_t* out, long n) {
  for (long i = 0; i < n; i += 16) V16::load(in + i).store((f16*)out + i);
}
EXPORT void from_bf16(const uint16_t* in, float* out, long n) {
  for (long i = 0; i < n; i += 16) V16::load((const bf16*)in + i).store(out + i);
}
EXPORT void from_bf16_pairs(const uint16_t* in, float* out, long n) {
  const auto load = [&](long i) { return V16::load_bf16_pairs((const bf16*)in + i); };
  for (long i = 0; i < n; i += 16) restore_bf16_pairs(load(i)).store(out + i);
}
EXPORT void from_f16(const uint16_t* in, float* out, long n) {
  for (long i = 0; i < n; i += 16) V16::load((const f16*)in + i).store(out + i);
}
EXPORT void from_u32(const uint32_t* in, float* out, long n) {
  for (long i = 0; i < n; i += 16) from_uint32(in + i).store(out + i);
}
EXPORT const char* isa() { return LLM42_ISA_NAME; }
"""


def compile_header(folder: Path, isa: str) -> Path:
    source, library = folder / "vec_test.cpp", folder / f"vec_{isa}.so"
    source.write_text(SOURCE)
    flags = [*build.FLAGS, *build._ISA_FLAGS[isa], f"-I{build.SOURCE_DIR}"]
    subprocess.run(
        [build.Toolchain.find().compiler, *flags, "-shared", str(source), "-o", library], check=True
    )
    return library


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("vec")
    return {isa: ctypes.CDLL(str(compile_header(folder, isa))) for isa in (build.widest_isa(), "portable")}


def call(library: ctypes.CDLL, name: str, values: np.ndarray, out_dtype: type) -> np.ndarray:
    values = np.ascontiguousarray(values)
    out = np.empty(values.size, out_dtype)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (values, out)]
    getattr(library, name)(*pointers, ctypes.c_long(values.size))
    return out


def apply(library: ctypes.CDLL, name: str, x: np.ndarray) -> np.ndarray:
    assert x.dtype == np.float32
    assert x.size % 16 == 0
    out = np.empty_like(x)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, out)]
    library.apply(FUNCTIONS.index(name), *pointers, ctypes.c_long(x.size))
    return out


def every_kind_of_float(step: int = 997) -> np.ndarray:
    """Every `step`-th of all bit patterns: all exponents, both signs, denormals, infinities, NaN."""
    bits = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32)
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 88.7228, -87.3366, 2**-149], np.float32
    )
    x = np.concatenate([bits.view(np.float32), special])
    return np.resize(x, -(-x.size // 16) * 16)


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Distance of fp32 `got` from fp64 `want`, in units in the last place of fp32 at `want`."""
    _, exponent = np.frexp(want)
    ulp = np.ldexp(1.0, np.maximum(exponent - 24, -149))
    return np.abs(got.astype(np.float64) - want) / ulp


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


CASES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float, float, int]] = {
    # function: fp64 reference, domain, promised accuracy in ulp
    "exp": (np.exp, -150.0, 88.72, 2),
    "exp_nonpositive": (np.exp, -87.3, 0.0, 2),
    "log": (np.log, 0.0, np.inf, 2),
    "neg_log1m": (lambda u: -np.log1p(-u), 2.0**-33, 1 - 2.0**-24, 3),
    "tanh": (np.tanh, -np.inf, np.inf, 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy_over_a_dense_sweep(libraries: dict[str, ctypes.CDLL], name: str) -> None:
    reference, low, high, promised = CASES[name]
    x = every_kind_of_float()
    with np.errstate(all="ignore"):
        want = reference(x.astype(np.float64))
    got = apply(libraries[build.widest_isa()], name, x)
    inside = (x > low) & (x < high)
    assert inside.sum() > 100_000
    worst = ulps(got[inside], want[inside]).max()
    assert worst <= promised, (
        f"{name}: {worst:.2f} ulp at {x[inside][ulps(got[inside], want[inside]).argmax()]}"
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_bits_on_every_isa(libraries: dict[str, ctypes.CDLL], name: str) -> None:
    x = every_kind_of_float(3989)
    native, generic = (apply(libraries[isa], name, x) for isa in (build.widest_isa(), "portable"))
    nan = np.isnan(native)  # the payload of a NaN is nobody's business
    assert np.array_equal(nan, np.isnan(generic))
    assert np.array_equal(bits(native)[~nan], bits(generic)[~nan])


def test_special_values(libraries: dict[str, ctypes.CDLL]) -> None:
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -200, -104.1, -0.0, 0.0, 88.8, 1e30, inf, nan] + [0.0] * 7, np.float32)

    def check(name: str, want: list[float]) -> None:
        got = apply(libraries[build.widest_isa()], name, x)[: len(want)]
        expected = np.array(want, np.float32)
        number = ~np.isnan(expected)
        assert np.array_equal(bits(got)[number], bits(expected)[number]), (name, got)
        assert np.isnan(got[~number]).all(), (name, got)

    check("exp", [0, 0, 0, 1, 1, inf, inf, inf, nan])
    check("exp_nonpositive", [0, 0, 0, 1, 1])
    check("log", [nan, nan, nan, -inf, -inf, np.log(np.float32(88.8)), np.log(np.float32(1e30)), inf, nan])
    check("tanh", [-1, -1, -1, -0.0, 0.0, 1, 1, 1, nan])
    assert np.isnan(apply(libraries[build.widest_isa()], "exp_nonpositive", x)[8])


def test_exp_underflows_gradually(libraries: dict[str, ctypes.CDLL]) -> None:
    x = np.linspace(-103.9, -87.4, 1600, dtype=np.float32)
    got = apply(libraries[build.widest_isa()], "exp", x)
    assert (got > 0).all()
    assert ulps(got, np.exp(x.astype(np.float64))).max() <= 1


def test_conversions_round_to_nearest_even(libraries: dict[str, ctypes.CDLL]) -> None:
    import torch

    x = every_kind_of_float(3989)
    number = ~np.isnan(x)
    tensor = torch.from_numpy(x)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        want = tensor.to(dtype)
        for library in libraries.values():
            got = call(library, f"to_{name}", x, np.uint16)
            assert np.array_equal(got[number], want.view(torch.uint16).numpy()[number])
            assert torch.from_numpy(got).view(dtype)[~torch.from_numpy(number)].isnan().all()


@pytest.mark.parametrize("name", ["bf16", "bf16_pairs", "f16"])
def test_every_16_bit_value_widens_exactly(libraries: dict[str, ctypes.CDLL], name: str) -> None:
    import torch

    x = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    want = torch.from_numpy(x).view(torch.float16 if name == "f16" else torch.bfloat16).float().numpy()
    for library in libraries.values():
        got = call(library, f"from_{name}", x, np.float32)
        assert np.array_equal(got[~np.isnan(want)], want[~np.isnan(want)])
        assert np.isnan(got[np.isnan(want)]).all()


def test_unsigned_integers_round_to_nearest(libraries: dict[str, ctypes.CDLL]) -> None:
    x = np.concatenate([np.arange(0, 2**32, 65521), 2**32 - np.arange(1, 400), 2**24 + np.arange(400)])
    x = np.resize(x, -(-x.size // 16) * 16).astype(np.uint32)
    for library in libraries.values():
        assert np.array_equal(call(library, "from_u32", x, np.float32), x.astype(np.float32))


def test_horizontal_sum_has_one_tree(libraries: dict[str, ctypes.CDLL]) -> None:
    rows = np.random.default_rng(0).standard_normal((4096, 16)).astype(np.float32)
    tree = rows
    while tree.shape[1] > 1:
        tree = tree[:, : tree.shape[1] // 2] + tree[:, tree.shape[1] // 2 :]
    for library in libraries.values():
        out = np.empty(len(rows), np.float32)
        library.sums(*[ctypes.c_void_p(a.ctypes.data) for a in (rows, out)], ctypes.c_long(len(rows)))
        assert np.array_equal(bits(out)[::2], bits(tree[:, 0].copy())[::2])
        assert np.array_equal(out[1::2], rows.max(axis=1)[1::2])
    left_to_right = np.zeros(len(rows), np.float32)
    for i in range(16):
        left_to_right += rows[:, i]
    assert (left_to_right != tree[:, 0]).mean() > 0.3  # the order does show in the bits


def test_instruction_sets_show_in_one_header() -> None:
    """Kernels are written once, on the types of ``vec.h``."""
    ladder = re.compile(r"__AVX|_mm\d+_|__m\d|LLM42_GENERIC_VEC")
    found = {
        path.relative_to(build.SOURCE_DIR).parts[0]
        for path in build.all_sources()
        if ladder.search(path.read_text())
    }
    assert found == {"vec.h", "vec"}


@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16"])
def test_avx512_form_compiles(tmp_path: Path, isa: str) -> None:
    compile_header(tmp_path, isa)
