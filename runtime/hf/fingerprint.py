"""What a compiled model was made from, so that the next call notices when it is no longer so.

Weights are compared by identity and by content, because an update through ``parameter.data`` moves no version
counter.
Besides them counts what a capture sees: the modules, their plain settings and their hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ROW = 4096  # words that are added up before their place counts
_SMALL = 1 << 16  # bytes
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Plain attributes of modules that change in ordinary use and that a capture does not depend on.
_NO_SETTINGS = frozenset({"training", "gradient_checkpointing", "warnings_issued"})


@dataclass(frozen=True)
class Fingerprint:
    """Compared with ``==``."""

    tensors: tuple[Any, ...]
    contents: tuple[int, ...]
    modules: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module, own_hooks: Iterable[int]) -> Fingerprint:
        """Of the model as it is now. `own_hooks`: ids of hooks that do not count."""
        ignored = frozenset(own_hooks)
        tensors = [*model.parameters(), *model.buffers()]
        return cls(
            tuple(map(_identity, tensors)),
            checksums(tensors),
            tuple(_structure(m, ignored) for m in model.modules()),
        )


def checksums(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Of the memory behind the tensors: one pass over it, not cryptographic. Small pieces share a sum."""
    memory = {t.untyped_storage().data_ptr(): _bytes(t) for t in tensors}  # several tensors may share one
    small: dict[torch.device, list[Tensor]] = {}
    parts = []
    for piece in memory.values():
        if piece.numel() < _SMALL:
            small.setdefault(piece.device, []).append(piece)
        else:
            parts.append(piece)
    parts += map(torch.cat, small.values())
    return tuple(int(x) for x in [_checksum(part) for part in parts])


def _bytes(tensor: Tensor) -> Tensor:
    """The whole storage behind a tensor, [nbytes] uint8."""
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return memory.set_(tensor.detach().untyped_storage())


def _checksum(memory: Tensor) -> Tensor:
    """The words of `memory` [n] uint8, summed by rows, and the rows weighted by their places; [] int64."""
    words = memory[: memory.numel() // 8 * 8].view(torch.int64)
    whole = words.numel() // _ROW * _ROW
    rows = torch.cat([words[:whole].view(-1, _ROW).sum(1), words[whole:], memory[words.numel() * 8 :].long()])
    return (rows * torch.arange(1, 2 * rows.numel(), 2, device=rows.device)).sum()


def _identity(tensor: Tensor) -> tuple[int, int, int, torch.dtype]:
    try:
        version = tensor._version
    except RuntimeError:  # made in inference mode, where changes are not counted
        version = 0
    return (id(tensor), version, tensor.data_ptr(), tensor.dtype)


def _structure(module: nn.Module, ignored: frozenset[int]) -> tuple[Any, ...]:
    hooks = tuple(i for kind in _HOOKS for i in getattr(module, kind) if i not in ignored)
    own_forward = id(module.__dict__["forward"]) if "forward" in module.__dict__ else 0
    settings = tuple(
        (k, repr(v)) for k, v in module.__dict__.items() if k not in _NO_SETTINGS and _is_plain(v)
    )
    return (id(module), hooks, own_forward, settings)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return len(value) < 64 and all(map(_is_plain, value))
    if isinstance(value, dict):
        return 0 < len(value) < 64 and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))
