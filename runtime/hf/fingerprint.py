"""What a compiled model was made from, so that the next call notices when it is no longer so.

Weights are compared by identity and by content, because an update through ``parameter.data`` moves no version
counter.
Besides them counts what a capture sees: the modules, their plain settings and their hooks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ROW = 4096  # words that are added up before their place counts
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
        memory = {t.untyped_storage().data_ptr(): t for t in tensors}  # several may share one
        return cls(
            tuple(map(_identity, tensors)),
            tuple(map(checksum, memory.values())),
            tuple(_structure(m, ignored) for m in model.modules()),
        )


def checksum(tensor: Tensor) -> int:
    """A sum over the words of the tensor's memory, weighted by their places; one pass, not cryptographic."""
    with torch.no_grad():
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        memory = memory.set_(tensor.detach().untyped_storage())
        words = memory[: memory.numel() // 8 * 8].view(torch.int64)
        whole = words.numel() // _ROW * _ROW
        sums = [words[:whole].view(-1, _ROW).sum(1), words[whole:], memory[words.numel() * 8 :].long()]
        rows = torch.cat(sums)
        total: int = (rows * torch.arange(1, 2 * rows.numel(), 2, device=rows.device)).sum().item()
        return total


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
