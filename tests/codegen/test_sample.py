"""llm42::sample and log-probabilities: the specification, the noise, and rows that never mix."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm42c.codegen.cpu import build
from llm42c.codegen.ops import registry, sample

registry.load()
ops = torch.ops.llm42
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _one_thread_unless_told() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parameters(
    rows: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> list[Tensor]:
    """One setting for all rows; row r has seed `seed + r` and position 7 r."""
    return [
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.arange(rows) + seed,
        torch.arange(rows) * 7,
    ]


def logits(
    rows: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0
) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=g) * scale).to(dtype)


SETTINGS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 1e-6},
    {"temperature": 0.5, "top_p": 0.0},
    {"temperature": 1.0, "top_k": 1},
)


def logprob_bound(x: Tensor, token: Tensor) -> Tensor:
    """exp 2 ulp and (x - max) one rounding of up to |x - max|; a lane adds V / 16 terms, the tree 4 more;
    log 2 ulp of its value; two more roundings of the result."""
    u, vocab = 2.0**-24, x.shape[-1]
    spread = (x.double().amax(-1) - x.double().gather(-1, token.clamp(min=0)[:, None])[:, 0]).abs()
    widest = (x.double().amax(-1) - x.double().amin(-1)).clamp(max=20)  # terms below exp(-20) do not count
    return u * (widest + 4 + vocab / 16 + 4 + 4 * math.log(vocab) + 3 * spread + 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 64, 100, 3001])
def test_follows_the_specification(vocab: int, dtype: torch.dtype) -> None:
    """Same tokens as the fp24 reference (no scores are close enough to be confused at these seeds)."""
    x = logits(24, vocab, dtype)
    for setting in SETTINGS:
        p = parameters(24, **setting)  # type: ignore[arg-type]
        token, logprob = ops.sample(x, *p)
        want_token, want_logprob = sample.sample.reference(x, *p)
        assert torch.equal(token, want_token), setting
        assert ((logprob - want_logprob).abs() <= logprob_bound(x, token)).all(), setting


def test_settings_may_differ_by_row_and_rows_never_mix() -> None:
    """Greedy and sampled rows in one batch, in any order, on any number of threads: the same bits."""
    x = logits(40, 5003, torch.bfloat16)
    columns = [parameters(1, **s, seed=11) for s in SETTINGS]  # type: ignore[arg-type]
    p = [torch.cat([columns[r % len(SETTINGS)][i] for r in range(40)]) for i in range(6)]
    alone = [ops.sample(x[r : r + 1], *[t[r : r + 1] for t in p]) for r in range(40)]
    want = torch.cat([t for t, _ in alone]), torch.cat([lp for _, lp in alone])
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(threads))
        token, logprob = ops.sample(x[order], *[t[order] for t in p])
        assert torch.equal(token, want[0][order])
        assert torch.equal(logprob.view(torch.int32), want[1][order].view(torch.int32))


def test_position_and_seed_change_the_draw_and_nothing_else_does() -> None:
    x = logits(1, 400, scale=1.0).expand(200, 400)
    p = parameters(200, temperature=1.0)
    p[4], p[5] = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    by_position = ops.sample(x, *p)[0]
    assert len(by_position.unique()) > 50
    assert torch.equal(by_position, ops.sample(x.clone(), *p)[0])
    p[4], p[5] = torch.arange(200), torch.zeros(200, dtype=torch.int64)
    assert len(ops.sample(x, *p)[0].unique()) > 50
    large = [*p[:4], torch.full((200,), -(2**63)), torch.arange(200) + 2**40]
    assert torch.equal(ops.sample(x, *large)[0], sample.sample.reference(x, *large)[0])


def test_ties_go_to_the_lowest_index() -> None:
    x = torch.zeros(3, 300)
    x[0, [17, 40, 299]] = 5
    x[1, [290, 291]] = 5
    assert ops.sample(x, *parameters(3))[0].tolist() == [17, 290, 0]
    assert ops.top_logprobs(x, 3)[1].tolist() == [[17, 40, 299], [290, 291, 0], [0, 1, 2]]
    x = torch.tensor([[-0.0, 0.0, -0.0]])
    assert ops.sample(x, *parameters(1))[0].item() == 0


def drawn(x: Tensor, count: int, **setting: float) -> set[int]:
    rows = x.expand(count, -1)
    return set(ops.sample(rows, *parameters(count, **setting))[0].tolist())  # type: ignore[arg-type]


def test_top_k_keeps_all_ties() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    assert drawn(x, 2000, temperature=1.0, top_k=2) == {0, 2, 3, 4}
    assert drawn(x, 2000, temperature=1.0, top_k=1) == {0}


def test_top_p_cuts_ties_by_index_and_keeps_at_least_one() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])  # 1/8 each: exact
    assert drawn(x, 2000, temperature=1.0, top_p=0.5) == {0, 1, 2, 3}
    assert drawn(x, 2000, temperature=1.0, top_p=0.51) == {0, 1, 2, 3, 4}
    assert drawn(x, 100, temperature=1.0, top_p=0.0) == {0}


def test_min_p_is_relative_to_the_greatest() -> None:
    x = torch.tensor([[0.6, 0.3, 0.061, 0.059]]).log()
    assert drawn(x, 5000, temperature=1.0, min_p=0.1) == {0, 1, 2}
    assert drawn(x, 100, temperature=1.0, min_p=1.0) == {0}


@given(
    vocab=st.integers(1, 400),
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from((0.3, 1.0, 2.5)),
    top_k=st.sampled_from((0, 1, 3, 40, 1000)),
    top_p=st.sampled_from((1.0, 0.95, 0.5, 0.1)),
    min_p=st.sampled_from((0.0, 0.02, 0.3)),
    coarse=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_filters_agree_with_hugging_face(
    vocab: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float, coarse: bool
) -> None:
    """`keep_mask`, and with it `sample`, is the warpers' chain; top-p ties aside, which HF leaves to sort."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    x = logits(1, vocab, seed=seed).double()
    if coarse and top_p == 1.0:
        x = x.round()
    scores = TemperatureLogitsWarper(temperature)(None, x)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    keep = sample.keep_mask(x[0], temperature, top_k, top_p, min_p)
    assert torch.equal(keep, scores[0] > -INF)
    setting = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    assert all(keep[i] for i in drawn(x.float(), 50, **setting))


@pytest.mark.parametrize("setting", SETTINGS[1:6], ids=str)
def test_draws_follow_the_filtered_softmax(setting: dict[str, float]) -> None:
    """Chi-square over 40,000 draws with fixed seeds, against the 99.9 % quantile."""
    count, vocab = 40_000, 130
    x = logits(1, vocab, scale=1.5, seed=5)
    keep = sample.keep_mask(x[0].double(), *(setting.get(n, d) for n, d in DEFAULTS))  # type: ignore[arg-type]
    expected = (x[0].double() / setting["temperature"]).masked_fill(~keep, -INF).softmax(0) * count
    token = ops.sample(x.expand(count, -1), *parameters(count, **setting))[0]  # type: ignore[arg-type]
    observed = torch.bincount(token, minlength=vocab).double()
    assert (observed[~keep] == 0).all()
    often = expected >= 5
    rest = expected[keep & ~often].sum(), observed[keep & ~often].sum()
    e = torch.cat([expected[often], rest[0][None]]) if rest[0] >= 5 else expected[often]
    o = torch.cat([observed[often], rest[1][None]]) if rest[0] >= 5 else observed[often]
    chi2, df = ((o - e) ** 2 / e).sum().item(), len(e) - 1
    limit = df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3  # Wilson-Hilferty
    assert chi2 < limit, (chi2, limit)
    uniform = torch.full_like(e, e.sum().item() / len(e))
    assert ((o - uniform) ** 2 / uniform).sum().item() > limit  # the test can fail


DEFAULTS = (("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))


def test_rows_that_cannot_be_sampled_fail_alone() -> None:
    x = logits(8, 1000)
    good = ops.sample(x, *parameters(8, temperature=1.0, top_p=0.9))
    x[1, 500] = NAN
    x[3, 0] = INF
    x[5] = -INF
    x[6, 999] = -NAN
    bad = torch.tensor([False, True, False, True, False, True, True, False])
    for setting in SETTINGS:
        token, logprob = ops.sample(x, *parameters(8, **setting))  # type: ignore[arg-type]
        assert torch.equal(token == -1, bad)
        assert torch.equal(logprob.isnan(), bad)
    token, logprob = ops.sample(x, *parameters(8, temperature=1.0, top_p=0.9))
    assert torch.equal(token[~bad], good[0][~bad])
    assert torch.equal(logprob[~bad], good[1][~bad])
    assert torch.equal(ops.token_logprobs(x, torch.zeros(8, dtype=torch.int64)).isnan(), bad)
    values, indices = ops.top_logprobs(x, 4)
    assert torch.equal((indices == -1).all(1), bad)
    assert torch.equal(values.isnan().all(1), bad)


def test_masked_logits_are_never_drawn() -> None:
    x = logits(500, 200)
    x[:, 3:] = -INF
    assert set(ops.sample(x, *parameters(500, temperature=5.0))[0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_of_tokens(dtype: torch.dtype) -> None:
    x = logits(6, 5003, dtype)
    tokens = torch.randint(5003, (6, 9), generator=torch.Generator().manual_seed(0))
    got, want = ops.token_logprobs(x, tokens), sample.token_logprobs.reference(x, tokens)
    for n in range(9):
        assert ((got - want)[:, n].abs() <= logprob_bound(x, tokens[:, n])).all()
    assert torch.equal(ops.token_logprobs(x, tokens[:, 0]), got[:, 0])
    token, logprob = ops.sample(x, *parameters(6, temperature=1.0))
    assert torch.equal(ops.token_logprobs(x, token), logprob)
    for k in (1, 5, 300, 5003):
        values, indices = ops.top_logprobs(x, k)
        assert torch.equal(indices, sample.top_logprobs.reference(x, k)[1])
        assert torch.equal(values, ops.token_logprobs(x, indices))


def test_any_layout_and_double() -> None:
    x = logits(5, 700)
    p = parameters(5, temperature=1.0)
    want = ops.sample(x, *p)
    for same in (x.t().contiguous().t(), x.repeat(1, 2)[:, :700], x.double()):
        token, logprob = ops.sample(same, *p)
        assert torch.equal(token, want[0])
        assert torch.equal(logprob, want[1])
    empty = ops.sample(x[:0], *[t[:0] for t in p])
    assert [t.shape for t in empty] == [(0,), (0,)]


def test_same_bits_on_every_isa(digest_on: Callable[[str, str], str]) -> None:
    code = """
    from test_sample import SETTINGS, logits, parameters
    x = logits(16, 5003)
    outs = [t for s in SETTINGS for t in torch.ops.llm42.sample(x, *parameters(16, **s))]
    print(digest(*outs, *torch.ops.llm42.top_logprobs(x, 20)))
    """
    assert digest_on(build.widest_isa(), code) == digest_on("portable", code)


# Known answers of philox4x32-10 from the Random123 distribution (Salmon et al.): counter, key, output.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def test_philox_known_answers() -> None:
    for counter, key, output in KNOWN_ANSWERS:
        c, k, want = (np.array([int(w, 16) for w in t.split()], np.uint32) for t in (counter, key, output))
        assert np.array_equal(sample.philox4x32(c, k), want)


NOISE = """
#include "kernels/philox.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void words(long key, unsigned first, long high, unsigned* out) {
  llm42::philox16(uint64_t(key), first, uint64_t(high), (uint32_t(*)[16])out);
}
EXPORT float noise(long seed, long position, long block, float* out) {
  uint32_t word[4][16];
  llm42::noise_words(seed, position, block, word);
  llm42::gumbel64(word, out);
  return llm42::gumbel64_bound(word);
}
"""


@pytest.mark.parametrize("isa", [build.widest_isa(), "portable"])
def test_the_kernels_noise_is_the_specified_one(isa: str, tmp_path: Path) -> None:
    source, library = tmp_path / "noise.cpp", tmp_path / "noise.so"
    source.write_text(NOISE)
    flags = [*build.FLAGS, *build._ISA_FLAGS[isa], f"-I{build.SOURCE_DIR}"]
    subprocess.run([build.Toolchain.find().compiler, *flags, "-shared", source, "-o", library], check=True)
    lib = ctypes.CDLL(str(library))
    lib.noise.restype = ctypes.c_float
    words = np.empty((4, 16), np.uint32)
    for key, first, high in (
        (0, 0, 0),
        (2**64 - 1, 2**32 - 16, 2**64 - 1),
        (0x123456789ABCDEF0, 77, 2**40 + 5),
    ):
        lib.words(
            ctypes.c_ulong(key),
            ctypes.c_uint(first),
            ctypes.c_ulong(high),
            ctypes.c_void_p(words.ctypes.data),
        )
        counter = np.zeros((16, 4), np.uint32)
        counter[:, 0] = np.arange(first, first + 16)
        counter[:, 2], counter[:, 3] = high & 0xFFFFFFFF, high >> 32
        keys = np.tile(np.array([key & 0xFFFFFFFF, key >> 32], np.uint32), (16, 1))
        assert np.array_equal(words, sample.philox4x32(counter, keys).T)
    got = np.empty(64, np.float32)
    for block in range(300):
        bound = lib.noise(
            ctypes.c_long(3), ctypes.c_long(9), ctypes.c_long(block), ctypes.c_void_p(got.ctypes.data)
        )
        want = sample.gumbel(3, 9, 64 * (block + 1))[64 * block :].numpy()
        # 3 ulp of -log(1 - u) shift its logarithm by 3 eps; log itself is good to 2 ulp
        assert (np.abs(got - want) <= 2.0**-23 * (3 + 2 * np.abs(want) + 1e-3)).all()
        assert got.max() <= bound


def test_opcheck() -> None:
    x = logits(4, 50)
    torch.library.opcheck(ops.sample.default, (x, *parameters(4, temperature=1.0)))
    torch.library.opcheck(ops.token_logprobs.default, (x, torch.zeros(4, 2, dtype=torch.int64)))
    torch.library.opcheck(ops.top_logprobs.default, (x, 3))


MISTAKES: dict[str, tuple[int, Tensor, str]] = {
    "logits": (0, torch.zeros(4), "expected logits"),
    "logits dtype": (0, torch.zeros(4, 5, dtype=torch.int64), "expected float32"),
    "temperature shape": (1, torch.zeros(3), "temperature"),
    "temperature dtype": (1, torch.zeros(4, dtype=torch.float64), "temperature"),
    "negative temperature": (1, torch.full((4,), -1.0), "temperature"),
    "infinite temperature": (1, torch.full((4,), INF), "temperature"),
    "NaN temperature": (1, torch.full((4,), NAN), "temperature"),
    "negative top_k": (2, torch.full((4,), -1, dtype=torch.int32), "top_k"),
    "top_k dtype": (2, torch.zeros(4, dtype=torch.int64), "top_k"),
    "top_p": (3, torch.full((4,), 1.1), "top_p"),
    "NaN top_p": (3, torch.full((4,), NAN), "top_p"),
    "min_p": (4, torch.full((4,), -0.1), "min_p"),
    "seed dtype": (5, torch.zeros(4), "seed"),
    "position shape": (6, torch.zeros(5, dtype=torch.int64), "position"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(mistake: str) -> None:
    index, value, message = MISTAKES[mistake]
    arguments = [logits(4, 50), *parameters(4)]
    arguments[index] = value
    with pytest.raises((ValueError, TypeError), match=f"sample.*{message}"):
        ops.sample(*arguments)


def test_mistakes_in_log_probabilities_are_refused() -> None:
    x = logits(4, 50)
    for tokens in (torch.full((4,), 50), torch.full((4,), -1)):
        with pytest.raises(ValueError, match="not in a vocabulary"):
            ops.token_logprobs(x, tokens)
    with pytest.raises(ValueError, match="expected tokens"):
        ops.token_logprobs(x, torch.zeros(3, dtype=torch.int64))
    for k in (0, 51):
        with pytest.raises(ValueError, match="top_logprobs"):
            ops.top_logprobs(x, k)
