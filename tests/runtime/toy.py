"""A tiny language model whose logits are a pure function of the token history read through the paged KV
cache.

Two layers of "KV". Layer 0 stores the token and its position; layer 1 stores a hash of everything layer 0
holds up to that position, and logits hash everything that layer 1 holds. So a wrong page, a stale entry, a
wrong position, or an entry that another graph wrote with other bits shows in the logits. The low byte of a
layer-1 entry stands for rounding: it moves log-probs by little and tokens seldom; the other bits move
everything.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from llm42c.capture.packed import KVCache, PackedInputs
from llm42c.codegen.ops.token_mask import apply_token_mask
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.draft_models import BuiltDraft
from llm42c.runtime.engine import Engine
from llm42c.runtime.processors import Decode
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.step_times import StepTimes
from llm42c.runtime.structured import Grammars

VOCAB = 48
EOS = 7
U = np.uint64


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, elementwise on uint64."""
    x = (x ^ (x >> U(30))) * U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U(27))) * U(0x94D049BB133111EB)
    return x ^ (x >> U(31))


@dataclass
class ToyModel:
    """The exact model. `fixed`: the one shape (tokens, sequences, rows) that it may be called at."""

    fixed: tuple[int, int, int] | None = None
    vocab_size: int = VOCAB
    max_position_embeddings: int = 256
    dtype: torch.dtype = torch.float32
    digest: str = "toy"
    dependence: str | None = "a toy"
    calls: int = 0
    shapes: set[tuple[int, int, int]] = field(default_factory=set)

    def new_kv_cache(self, num_pages: int, page_size: int) -> KVCache:
        rng = np.random.default_rng(num_pages)

        def noise(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.integers(0, 2**60, shape))

        return KVCache(
            [noise(num_pages, 1, 1, page_size) for _ in range(2)],
            [noise(num_pages, 1, page_size, 1) for _ in range(2)],
        )

    def kv_bytes_per_page(self, page_size: int) -> int:
        return 4 * 8 * page_size

    def forward(self, inputs: PackedInputs, cache: KVCache) -> torch.Tensor:
        batch = _Batch(inputs, cache)
        shape = (len(batch.ids), len(batch.kv_lens), len(batch.rows))
        self.shapes.add(shape)
        assert self.fixed is None or shape == self.fixed, (shape, self.fixed)
        h = batch.write_tokens_and_hash()
        batch.write_states(self.disturb_states(batch, h))
        logits = self.disturb_logits(batch, toy_logits(*batch.context()))
        self.calls += 1
        return torch.from_numpy(logits)

    def disturb_states(self, batch: _Batch, h: np.ndarray) -> np.ndarray:
        return h

    def disturb_logits(self, batch: _Batch, logits: np.ndarray) -> np.ndarray:
        return logits


class _Batch:
    """The arrays of a packed batch, checked, and the history of each sequence gathered through its pages."""

    def __init__(self, inputs: PackedInputs, cache: KVCache) -> None:
        self.ids, self.positions, self.slots = (
            x.numpy() for x in (inputs.input_ids, inputs.positions, inputs.slot_mapping)
        )
        self.cu, self.kv_lens, self.rows = (
            x.numpy() for x in (inputs.cu_seqlens_q, inputs.kv_lens, inputs.logits_indices)
        )
        self.page = cache.k[0].shape[-1]
        self.flat = [x.numpy().reshape(-1) for pair in zip(cache.k, cache.v, strict=True) for x in pair]
        self.n = int(self.cu[-1])
        q = np.diff(self.cu)
        assert self.cu[0] == 0
        assert (q >= 0).all()
        assert self.n <= len(self.ids)
        assert (self.slots[self.n :] == -1).all()
        assert (self.slots[: self.n] >= 0).all()
        assert len(set(self.slots[: self.n].tolist())) == self.n, "two rows write one slot"
        assert ((self.rows >= 0) & (self.rows < max(1, self.n))).all()
        active = np.flatnonzero(q)
        lens = self.kv_lens[active].astype(np.int64)
        assert (lens >= q[active]).all()
        self.start = np.zeros(len(q), dtype=np.int64)
        self.start[active] = np.cumsum(lens) - lens
        seq = np.repeat(active, lens)
        self.p = np.arange(int(lens.sum())) - self.start[seq]
        self.seq_start = self.start[seq]
        table = inputs.block_table.numpy()
        self.gathered = table[seq, self.p // self.page].astype(np.int64) * self.page + self.p % self.page
        self.seq_of_row = np.repeat(np.arange(len(q)), q)  # of the n real rows
        self.at = self.start[self.seq_of_row] + self.positions[: self.n]
        expected = (
            self.kv_lens[self.seq_of_row] - q[self.seq_of_row] + np.arange(self.n) - self.cu[self.seq_of_row]
        )
        assert (self.positions[: self.n] == expected).all(), "positions disagree with kv_lens"
        assert (self.gathered[self.at] == self.slots[: self.n]).all(), "slots disagree with the block table"

    def write_tokens_and_hash(self) -> np.ndarray:
        """Layer 0, and the state [n] that each row leaves in layer 1."""
        self.flat[0][self.slots[: self.n]] = self.ids[: self.n]
        self.flat[1][self.slots[: self.n]] = self.positions[: self.n]
        assert (self.flat[1][self.gathered] == self.p).all(), "stale or foreign KV is read"
        return states(self.flat[0][self.gathered], self.p, self.seq_start)[self.at]

    def write_states(self, h: np.ndarray) -> None:
        self.flat[2][self.slots[: self.n]] = h
        self.flat[3][self.slots[: self.n]] = ~h

    def context(self) -> tuple[np.ndarray, np.ndarray]:
        """For each logits row, hashes of the high and the low parts of all states that it attends to."""
        h = self.flat[2][self.gathered]
        high, low = context_of(h, self.p, self.seq_start)
        at = self.at[self.rows] if self.n else np.zeros(len(self.rows), dtype=np.int64)
        return high[at], low[at]


def states(tokens: np.ndarray, p: np.ndarray, seq_start: np.ndarray) -> np.ndarray:
    """Layer-1 states [N] int64 of packed histories: token ids [N], positions [N], index of each history's
    start [N].
    """
    e = mix(tokens.astype(U) * U(0x9E3779B97F4A7C15) + mix(p.astype(U) + U(1)))
    return (mix(_running(e, seq_start)) >> U(2)).astype(np.int64)


def context_of(h: np.ndarray, p: np.ndarray, seq_start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    h = h.astype(U)
    high = _running(mix((h >> U(8)) + mix(p.astype(U))), seq_start)
    low = _running(mix((h & U(255)) + p.astype(U) * U(1 << 32)), seq_start)
    return high, low


def _running(x: np.ndarray, seq_start: np.ndarray) -> np.ndarray:
    total = np.cumsum(x)
    return total - np.where(seq_start > 0, total[np.maximum(seq_start, 1) - 1], U(0))


def toy_logits(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """[R, VOCAB] fp32: multiples of 1/8 below 8 (ties are common), plus a small offset for odd tokens."""
    v = np.arange(VOCAB, dtype=U)
    coarse = (mix(mix(high)[:, None] + v * U(0xD1B54A32D192ED03)) >> U(58)).astype(np.float32) / 8
    fine = ((mix(low)[:, None] * (U(2) * v + U(1))) & U(255)).astype(np.float32) * np.float32(2.0**-14)
    return coarse + np.where(v % U(2) == 1, fine, np.float32(0))


def pure_logits(tokens: list[int]) -> np.ndarray:
    """[VOCAB] logits after `tokens`, with no cache at all."""
    p, zero = np.arange(len(tokens)), np.zeros(len(tokens), dtype=np.int64)
    high, low = context_of(states(np.array(tokens), p, zero), p, zero)
    return toy_logits(high[-1:], low[-1:])[0]


@dataclass
class NoisyModel(ToyModel):
    """A fast path that truly differs: its bits depend on time, shape and place, and some tokens flip.

    `noisy(tokens, call)` says when; elsewhere it is exact. `flip`: share of rows whose token or state changes
    grossly.
    """

    noisy: Callable[[int, int], bool] = lambda tokens, call: True
    flip: float = 0.1
    digest: str = "noisy"

    def _noise(self, batch: _Batch, count: int, salt: int) -> np.ndarray | None:
        if not self.noisy(len(batch.ids), self.calls):
            return None
        return mix(np.arange(count, dtype=U) + U((self.calls * 977 + batch.n * 131 + salt) * 4096))

    def disturb_states(self, batch: _Batch, h: np.ndarray) -> np.ndarray:
        noise = self._noise(batch, len(h), 1)
        if noise is None:
            return h
        gross = (noise >> U(40)).astype(np.float64) / 2.0**24 < self.flip / 4
        return h ^ (noise & U(127)).astype(np.int64) ^ np.where(gross, 1 << 30, 0) ^ 128

    def disturb_logits(self, batch: _Batch, logits: np.ndarray) -> np.ndarray:
        noise = self._noise(batch, len(logits), 2)
        if noise is None:
            return logits
        gross = (noise >> U(40)).astype(np.float64) / 2.0**24 < self.flip
        logits = logits + np.float32(2.0**-16)
        rows = np.flatnonzero(gross)
        logits[rows, (noise[rows] & U(31)).astype(np.int64)] += np.float32(16)
        return logits


@dataclass
class FlipModel(ToyModel):
    """Changes the token chosen after the given absolute positions, whatever the logits are (and nothing
    else).
    """

    positions: frozenset[int] = frozenset()
    token: int | None = None  # what to choose there; None: another than the right one
    digest: str = "flip"
    armed: bool = False  # off while shapes are probed or prompts of other tests run

    def disturb_logits(self, batch: _Batch, logits: np.ndarray) -> np.ndarray:
        if not self.armed:
            return logits
        logits = logits.copy()
        for i, row in enumerate(batch.rows):
            if batch.n and int(batch.positions[row]) in self.positions:
                best = int(logits[i].argmax())
                logits[i, (best + 1) % VOCAB if self.token is None else self.token] += np.float32(64)
        return logits


class ToySampler:
    """A row-independent sampler in numpy, by the contract of `llm42::sample`."""

    def sample(self, logits, temperature, top_k, top_p, min_p, seed, position):  # type: ignore[no-untyped-def]
        x = logits.float().numpy()
        tokens = np.nan_to_num(x, nan=-np.inf).argmax(axis=1)
        hot = np.flatnonzero(temperature.numpy() > 0)
        for r in hot:
            tokens[r] = self._draw(
                x[r].astype(np.float64), *(float(a[r]) for a in (temperature, top_k, top_p, min_p)),
                int(seed[r]), int(position[r]),
            )  # fmt: skip
        bad = ~np.isfinite(x.max(axis=1))
        tokens[bad] = -1
        return torch.from_numpy(tokens), self.token_logprobs(logits, torch.from_numpy(np.maximum(tokens, 0)))

    def _draw(self, x, temperature, top_k, top_p, min_p, seed, position):  # type: ignore[no-untyped-def]
        z = (x - x.max()) / temperature
        keep = np.ones(len(x), dtype=bool)
        if 0 < top_k < len(x):
            keep = x >= np.sort(x)[-int(top_k)]
        if top_p < 1:
            order = np.lexsort((np.arange(len(x)), -np.where(keep, z, -np.inf)))
            p = np.exp(np.where(keep, z, -np.inf))[order]
            before = np.cumsum(p / p.sum()) - p / p.sum()
            keep[order[before >= top_p]] = False
        keep &= np.exp(z) >= min_p
        bits = mix(np.arange(len(x), dtype=U) + mix(U(seed) + mix(np.array([position], dtype=U))))
        u = ((bits >> U(11)).astype(np.float64) + 0.5) / 2.0**53
        return np.where(keep, z - np.log(-np.log(u)), -np.inf).argmax()

    def token_logprobs(self, logits, tokens):  # type: ignore[no-untyped-def]
        x = logits.float().numpy()
        with np.errstate(invalid="ignore"):
            shifted = x - x.max(axis=1, keepdims=True)
        total = np.log(np.exp(shifted).sum(axis=1, dtype=np.float32))
        chosen = np.take_along_axis(shifted, tokens.numpy()[:, None], axis=1)[:, 0]
        return torch.from_numpy(chosen - total)

    def top_logprobs(self, logits, k):  # type: ignore[no-untyped-def]
        x = logits.float().numpy()
        ids = np.argsort(-x, axis=1, kind="stable")[:, :k]
        shifted = x - x.max(axis=1, keepdims=True)
        total = np.log(np.exp(shifted).sum(axis=1, dtype=np.float32))
        return torch.from_numpy(np.take_along_axis(shifted, ids, axis=1) - total[:, None]), torch.from_numpy(
            ids
        )

    def apply_token_mask(self, logits, mask):  # type: ignore[no-untyped-def]
        return apply_token_mask.reference(logits, mask)


class Flat(StepTimes):
    """Every step takes one second, so that drafts always pay."""

    def of(self, num_tokens: int) -> float:
        return 1.0


def toy_decode(ids: list[int]) -> str:
    """Token i is a letter; token 10 is the first half of a two-token character."""
    text, i = "", 0
    while i < len(ids):
        if ids[i] == 10:
            text += "é" if i + 1 < len(ids) else "\ufffd"
            i += 2
        else:
            text += chr(ord("A") + ids[i])
            i += 1
    return text


class ToyTokens:
    """The toy's letters as llguidance takes a table of tokens."""

    eos_token_id, bos_token_id, special_token_ids = EOS, None, (EOS,)
    tokens = tuple(chr(ord("A") + i).encode() for i in range(VOCAB))

    def __call__(self, text: str) -> list[int]:
        return [ord(letter) - ord("A") for letter in text]


def small_config(**changes: object) -> EngineConfig:
    """Small enough that pages, chunks, windows and buckets all end inside a short request."""
    base: dict[str, object] = {
        "max_num_seqs": 6,
        "max_num_batched_tokens": 24,
        "page_size": 4,
        "num_pages": 64,
        "fast_buckets": (1, 2, 3, 4, 6, 8, 12, 16, 24),
        "row_buckets": (2, 8),
        "verify_tokens": 12,
        "verify_seqs": 4,
        "verify_window": 5,
        "eos_token_ids": (EOS,),
        "probe_compositions": 3,
    }
    return EngineConfig(**(base | changes))  # type: ignore[arg-type]


def make_engine(
    fast: ToyModel | None = None,
    config: EngineConfig | None = None,
    check: bool = False,
    sampler: ToySampler | None = None,
    decode: Decode = toy_decode,
    drafts: Callable[[], ToyModel] = lambda: NoisyModel(flip=0.2),
) -> Engine:
    """An engine on the toy. `check=False` takes the verifier's row independence for granted. `drafts` makes
    the model that drafts where one is asked for."""
    config = config or small_config()
    verifier = ToyModel(fixed=(config.verify_tokens, config.verify_seqs, config.rows))
    lazy = dataclasses.replace(config, certify="lazy")
    engine = Engine(
        fast or ToyModel(),
        verifier,
        lazy,
        sampler=sampler or ToySampler(),
        decode=decode,
        grammars=Grammars(ToyTokens(), VOCAB, config.eos_token_ids),
        draft_models=lambda spec: BuiltDraft(drafts(), 1000),
    )
    engine.certificates.verifier_checked |= not check
    if config.certify == "startup":
        engine.certify()
    return engine


def solo(prompt: list[int], params: SamplingParams, **changes: object) -> tuple[list[int], list[float]]:
    """Tokens and log-probs of a request that has a fresh engine to itself, everything verified."""
    engine = make_engine(config=small_config(**({"verify": "always"} | changes)))
    (output,) = engine.generate([prompt], params)
    return output.token_ids, output.logprobs


def expected_digest(tokens: list[int], num_positions: int) -> str:
    """What `Engine.kv_digest` must give for the canonical KV of the first positions of `tokens`."""
    p, zero = np.arange(num_positions), np.zeros(num_positions, dtype=np.int64)
    h = states(np.array(tokens[:num_positions]), p, zero)
    digest = hashlib.blake2b(digest_size=16)
    for part in (np.array(tokens[:num_positions]), p, h, ~h):
        digest.update(part.tobytes())
    return digest.hexdigest()


def reference(prompt: list[int], max_tokens: int, stop: frozenset[int] = frozenset({EOS})) -> list[int]:
    """Greedy decoding with no engine, no cache and no batch."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(pure_logits(tokens).argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]
