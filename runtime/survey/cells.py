"""One cell of the survey: a decoder class, a dtype and a way to run it, and what came of it.

Paths:

- ``compile``: ``torch.compile(model, backend="llm42", dynamic=True)``, called on [B, S] tokens; what has no
  known order is refused (``strict``)
- ``generate``: ``llm42c.deterministic(model).generate``; eager is transformers' own ``generate``

A cell is *ok* if every row has the same bits alone, in batches of other sizes, at another place and beside
other rows (of another length: padded, for ``generate``), and in fp32 logits are within a bound of eager's.
It is *refused* if llm42 says so in one line. Everything else is *wrong*, a *crash* or *slow*.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llm42c.errors import Llm42Error, OptionsError
from llm42c.runtime.survey.call_by_call import call_by_call
from llm42c.runtime.survey.tiny import PAD, one_line

Path = Literal["compile", "generate"]
State = Literal["ok", "refused", "wrong", "crash", "slow"]
PATHS: tuple[Path, ...] = ("compile", "generate")
DTYPES = ("float32", "bfloat16")
# At so few rows a library picks its kernels by their number; the longer rows exceed windows and chunks.
_LENGTH = 3
_ORDERS = ([0, 1, 2, 3, 4], [3, 0], [4, 2, 1])  # rows of the batches that are compared with rows alone
_LONGER = 17
_PROMPTS = (5, 17, 9)
_NEW_TOKENS = 6
# The longest sum of a tiny model has this many terms; a chain of n products is the exact product for weights
# that differ by at most n·eps each.
_LONGEST_SUM = 128
# Small enough that chunks, windows and buckets end inside a short prompt.
ENGINE: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "verify_tokens": 16,
    "verify_seqs": 8,
    "verify_window": 8,
    "probe_compositions": 1,
    "kv_cache_bytes": 2**22,
    "persist_certificates": False,
}


@dataclass(frozen=True)
class Cell:
    """What came of one class, dtype and path; `told` is the refusal or what is wrong, in one line."""

    name: str
    dtype: str
    path: str
    state: State
    told: str = ""
    seconds: float = 0.0
    revealing: bool = False  # eager's rows depend on their batch here, so that equal bits mean something


class _WrongError(Exception):
    """What an answer got wrong, in one line."""


def judge(work: Callable[[], None]) -> tuple[State, str]:
    """Run a cell's work and say what came of it."""
    try:
        work()
    except _WrongError as error:
        return "wrong", str(error)
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            return "crash", one_line(error)
        lines = refusal.strip().splitlines()
        return ("refused", lines[0]) if len(lines) == 1 else ("crash", f"a refusal of {len(lines)} lines")
    return "ok", ""


def _refusal(error: BaseException | None) -> str | None:
    """The message of llm42's own error, also where Dynamo has wrapped it."""
    while error is not None:
        if isinstance(error, Llm42Error) and not isinstance(error, OptionsError):
            return str(error)
        inner = getattr(error, "inner_exception", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None


def tokens(model: Any, rows: int, length: int, seed: int = 1) -> Tensor:
    """[rows, length] token ids, special ones left out."""
    vocab = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(10, min(vocab, 190), (rows, length), generator=generator)


def logits(model: Any, ids: Tensor) -> Tensor:
    """[B, S, V]."""
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def is_revealing(model: Any) -> bool:
    """Eager gives a row other bits in another batch."""
    ids = tokens(model, 5, _LENGTH)
    together = logits(model, ids)
    return any(not torch.equal(logits(model, ids[i : i + 1])[0], together[i]) for i in range(len(ids)))


def require_sane(model: Any) -> None:
    """Raises ValueError where equal answers would prove nothing: no scale, equal rows, unmixed tokens.

    Raises what eager itself raises for a batch that the checks run.
    """
    for rows in (1, *map(len, _ORDERS)):  # raises where eager itself cannot run a batch
        logits(model, tokens(model, rows, _LENGTH))
    ids = tokens(model, 2, _LONGER)
    out = logits(model, ids).float()
    other = ids.clone()
    other[:, :-1] -= 1
    if not torch.isfinite(out).all() or not 1e-3 < out.std().item() < 1e3:
        raise ValueError(f"its random logits have no sane scale (deviation {out.std().item():.3g})")
    if torch.equal(out[0], out[1]):
        raise ValueError("its logits do not depend on the tokens")
    if torch.equal(logits(model, other)[:, -1].float(), out[:, -1]):
        raise ValueError("its last logits do not depend on the tokens before")


@torch.no_grad()
def rounding_bound(model: Any, compute: Callable[[], Tensor]) -> float:
    """How far rounding of fp32 sums can move a logit that `compute` gets of eager `model`, to first order.

    Rounding in a chain of n products is a change of its weights by at most n·eps each: that change is made at
    random, four times, and the largest move of any logit, twice, is the bound.
    """
    reference, moved = compute(), 0.0
    size = _LONGEST_SUM * torch.finfo(torch.float32).eps
    generator = torch.Generator().manual_seed(7)
    kept = {name: p.clone() for name, p in model.named_parameters() if p.is_floating_point()}
    for _ in range(4):
        for name, p in model.named_parameters():
            if name in kept:
                sign = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
                p.copy_(kept[name] * (1 + size * sign))
        moved = max(moved, (compute() - reference).abs().max().item())
    for name, p in model.named_parameters():
        if name in kept:
            p.copy_(kept[name])
    return 2 * moved


def _require_close(found: Tensor, eager: Any, compute: Callable[[], Tensor], what: str) -> None:
    bound = rounding_bound(eager, compute)
    error = (found - compute()).abs().max().item()
    if not error <= bound:
        raise _WrongError(f"{what} differ from eager's by {error:.2g}; rounding allows {bound:.2g}")


def check_compile(
    model: Any, eager: Any, options: dict[str, Any] | None = None, *, inductor: bool = True
) -> None:
    """Path ``compile``: raises what is wrong, or what the backend raised; `eager`: the same model in fp32."""
    backend = "llm42" if inductor else call_by_call
    options = {"strict": True} | (options or {})
    compiled = torch.compile(model, backend=backend, dynamic=True, options=options)
    ids = tokens(model, 5, _LENGTH)
    alone = torch.cat([logits(compiled, ids[i : i + 1]) for i in range(len(ids))])
    for order in _ORDERS:
        together = logits(compiled, ids[order])
        for place, row in enumerate(order):
            if not torch.equal(together[place], alone[row]):
                raise _WrongError(f"a row has other bits at place {place} of a batch of {len(order)}")
    if not torch.isfinite(alone).all() and torch.isfinite(logits(eager, ids)).all():
        raise _WrongError("logits are not finite")
    if model.dtype == torch.float32:  # a model in bf16 may give its logits in fp32
        _require_close(alone, eager, lambda: logits(eager, ids), "logits")
        longer = tokens(model, 2, _LONGER)
        _require_close(logits(compiled, longer), eager, lambda: logits(eager, longer), "longer logits")


def check_generate(model: Any, eager: Any) -> None:
    """Path ``generate``: greedy tokens and the bits of their log-probs, alone and in padded batches."""
    import llm42c

    wrapped = llm42c.deterministic(model, **ENGINE)
    prompts = [tokens(model, 1, length, seed)[0] for seed, length in enumerate(_PROMPTS, start=2)]
    alone = [_generate(wrapped, [p]) for p in prompts]
    for order in ([0, 1, 2], [2, 0]):
        together = _generate(wrapped, [prompts[i] for i in order])
        for place, row in enumerate(order):
            for mine, single in zip(together, alone[row], strict=True):
                if not torch.equal(mine[place], single[0]):
                    raise _WrongError(
                        f"a prompt of {len(prompts[row])} tokens has another answer among {len(order)}"
                    )
    if wrapped.dtype == torch.float32:
        for p, (new, _, scores) in zip(prompts, alone, strict=True):
            said = functools.partial(_said, eager, p, new[0])
            _require_close(scores, eager, said, "generated logits")


class _Says(LogitsProcessor):
    """Makes the answer to a prompt of `length` tokens be `new` [N]."""

    def __init__(self, length: int, new: Tensor) -> None:
        self._length, self._new = length, new

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self._new[input_ids.shape[1] - self._length]] = 0.0
        return only


def _said(eager: Any, prompt: Tensor, new: Tensor) -> Tensor:
    """Logits [1, N, V] of transformers' own `generate`, made to answer `prompt` [L] with `new` [N]."""
    says = _Says(len(prompt), new)
    out = _call_generate(eager, prompt[None], torch.ones_like(prompt)[None], logits_processor=[says])
    return torch.stack(out.logits, 1)


def _generate(model: Any, prompts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(new tokens [B, N], their log-probabilities [B, N], logits [B, N, V]) of prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    out = _call_generate(model, ids, mask)
    return out.sequences[:, width:], out.logprobs, torch.stack(out.logits, 1)


def _call_generate(model: Any, ids: Tensor, mask: Tensor, **more: Any) -> Any:
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )
