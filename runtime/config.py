"""Engine configuration: a frozen, validated value. Nothing here changes the bits of a deterministic request
except `verify_tokens`, `verify_seqs`, `verify_rows` and `page_size`, which are part of the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm42c.errors import ConfigError
from llm42c.runtime.drafters import Speculate, drafter_source

DEFAULT_BUCKETS = (
    *(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64),
    *(96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
)
DEFAULT_ROW_BUCKETS = (2, 8, 32, 128, 512)
WINDOW_ROWS = 128  # of a fast step, for drafts that came with their requests


@dataclass(frozen=True)
class EngineConfig:
    """How an `Engine` batches, verifies and stores KV.

    Raises ConfigError from the constructor when a value cannot work.
    """

    max_num_seqs: int = 32  # requests that may hold KV at once
    max_num_batched_tokens: int = 512  # tokens of one fast step
    max_model_len: int | None = None  # None, or more than the model has: the model's own context length
    page_size: int = 16  # tokens a KV page
    num_pages: int | None = None  # None: as many as `kv_cache_bytes` holds
    kv_cache_bytes: int = 256 * 2**20
    fast_buckets: tuple[int, ...] = DEFAULT_BUCKETS  # token counts the fast graph runs at
    row_buckets: tuple[int, ...] = (
        DEFAULT_ROW_BUCKETS  # logits rows the fast graph runs at (capped by tokens)
    )

    verify: Literal["auto", "always"] = "auto"
    verify_tokens: int = 64  # T_v: tokens of every verifier step, padding included
    verify_seqs: int = 32  # S_v
    verify_rows: int | None = None  # R_v; None: verify_tokens
    verify_window: int = 32  # pending tokens that make a request ready for verification
    max_pending: int | None = None  # pending tokens at which a request waits; None: twice the window

    certify: Literal["lazy", "startup"] = "lazy"
    certificates_path: str | None = None  # a directory; None: certificates live as long as the engine
    probe_compositions: int = 3  # batches a shape must survive to be certified
    audit_fraction: float = 1 / 128  # share of certified positions that is replayed; 0 turns audits off
    audit_seed: int = 0

    cuda_graphs: Literal["auto", "off"] = "auto"  # auto: on a GPU that has the model to itself
    cuda_graph_tokens: int = 512  # larger steps run without one

    speculate: Speculate = None  # who drafts, as drafters.py names them, a drafter or what makes one
    prefix_cache: bool = True
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            *("max_num_seqs", "max_num_batched_tokens", "page_size", "kv_cache_bytes", "verify_tokens"),
            *("verify_seqs", "verify_window", "probe_compositions", "cuda_graph_tokens"),
        ):
            self._positive(name)
        for name in ("max_model_len", "num_pages", "verify_rows", "max_pending"):
            if getattr(self, name) is not None:
                self._positive(name)
        if self.verify not in ("auto", "always"):
            raise ConfigError(f"verify must be 'auto' or 'always', not {self.verify!r}")
        if self.certify not in ("lazy", "startup"):
            raise ConfigError(f"certify must be 'lazy' or 'startup', not {self.certify!r}")
        drafter_source(self.speculate)
        if self.cuda_graphs not in ("auto", "off"):
            raise ConfigError(f"cuda_graphs must be 'auto' or 'off', not {self.cuda_graphs!r}")
        if not 0.0 <= self.audit_fraction <= 1.0:
            raise ConfigError(f"audit_fraction must be in [0, 1], not {self.audit_fraction!r}")
        if self.rows > self.verify_tokens:
            raise ConfigError(f"verify_rows ({self.rows}) exceeds verify_tokens ({self.verify_tokens})")
        if self.max_pending is not None and self.max_pending < self.verify_window:
            raise ConfigError(
                f"max_pending ({self.max_pending}) is smaller than verify_window ({self.verify_window})"
            )
        for name in ("fast_buckets", "row_buckets"):
            sizes = getattr(self, name)
            if not sizes or any(b < 1 for b in sizes) or list(sizes) != sorted(set(sizes)):
                raise ConfigError(f"{name} must be ascending positive integers, not {sizes!r}")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is smaller than "
                f"max_num_seqs ({self.max_num_seqs}): not every running request could decode"
            )

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")

    @property
    def rows(self) -> int:
        """R_v: logits rows of every verifier step."""
        return self.verify_tokens if self.verify_rows is None else self.verify_rows

    @property
    def verify_chunk(self) -> int:
        """Positions that the verifier can compute in one step with logits of each."""
        return min(self.verify_tokens, self.rows)

    @property
    def pending_limit(self) -> int:
        return 2 * self.verify_window if self.max_pending is None else self.max_pending

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """The fast graph's token counts; the largest is `max_num_batched_tokens`."""
        top = self.max_num_batched_tokens
        return (*(b for b in self.fast_buckets if b < top), top)

    def row_bucket(self, num_tokens: int, num_rows: int) -> int:
        """Logits rows that a fast step of `num_tokens` runs at when `num_rows` are wanted."""
        for size in self.row_buckets:
            if size >= num_rows:
                return min(size, num_tokens)
        return num_tokens

    def shapes(self) -> list[tuple[int, int]]:
        """Every (tokens, rows) that the scheduler can ever run the fast graph at, ascending."""
        found = set()
        for tokens in self.token_buckets:
            most = min(tokens, max(self.max_num_seqs, self.window_rows(tokens)))
            found |= {(tokens, self.row_bucket(tokens, n)) for n in range(1, most + 1)}
        return sorted(found)

    def window_rows(self, num_tokens: int) -> int:
        """Logits rows that a fast step of `num_tokens` may have because of drafts: for those that came with
        their requests few buckets are filled, as each is probed."""
        if num_tokens <= WINDOW_ROWS and num_tokens & (num_tokens - 1) == 0:
            return num_tokens
        return min(num_tokens, self.row_bucket(num_tokens, self.max_num_seqs))
