"""Digest and health of a model's weights: the first line of every contract."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from llm42c.errors import WeightsError
from llm42c.memory import forget

_PIECE = 1 << 20  # elements that are tested at once, so that a large weight is never held twice


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, in name order.

    Tied tensors count under each of their names, so untying them changes the digest.
    """
    digest = hashlib.sha256()
    seen: dict[int, bytes] = {}
    state = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    for name in sorted(state):
        tensor = state[name]
        if id(tensor) not in seen:
            seen[id(tensor)] = hashlib.sha256(_bytes_of(tensor)).digest()
            forget(tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + seen[id(tensor)])
    return digest.hexdigest()


def require_finite(model: nn.Module) -> None:
    """Raise WeightsError naming the first parameter that holds NaN or infinity, or lies packed elsewhere."""
    for name, parameter in model.named_parameters():
        finite = _is_finite(parameter.detach())
        forget(parameter)
        if not finite:
            if parameter.untyped_storage().nbytes() < parameter.nbytes:  # as WeightStore.release leaves it
                raise WeightsError(
                    f"weights of {name!r} are packed in another engine of this model: close that one, or "
                    "build this one with its compiler"
                )
            raise WeightsError(f"weights of {name!r} hold NaN or infinity: the checkpoint is damaged")


def _is_finite(tensor: Tensor) -> bool:
    rows = max(1, _PIECE // max(1, tensor[:1].numel())) if tensor.dim() else 1
    for piece in tensor.split(rows) if tensor.dim() else (tensor,):
        # A sum is NaN or infinite when an element is; the exact test runs only then.
        if not torch.isfinite(piece.float().sum()) and not torch.isfinite(piece).all():
            return False
    return True
