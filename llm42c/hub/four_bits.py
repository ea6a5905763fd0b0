"""Checkpoints of four bits as Hugging Face has them: GPTQ, AWQ, compressed-tensors, without their libraries.

A weight is integers of four bits, a scale and perhaps a zero for every group along k. All three methods say
that, each in its own layout; here they become blocks of ``i4_<group>``, whose scales and minima are exact::

    w[n, k] = s[n, g] · (q[n, k] - z[n, g]) = s · q + (-s · z)

What is not of that kind (other widths, activation order, groups that 32 does not divide) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm42c.codegen import quant
from llm42c.errors import WeightsError
from llm42c.hub.quantised_folder import QuantisedFolder, assembled

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which column of eight each nibble of a word holds
_NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)


@dataclass(frozen=True)
class FourBits:
    """q, [N, K] uint8; scale, zero: [N, groups]; ``order``: the group of each k, where the file says it."""

    q: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor | None = None


Reader = Callable[[dict[str, Tensor], dict[str, Any]], FourBits]


def _words(packed: Tensor) -> Tensor:
    """[a, b] int32 → [a, 8 b] uint8: the lowest nibble first."""
    return ((packed.unsqueeze(-1) >> _NIBBLES) & 15).flatten(1).to(torch.uint8)


def _gptq(parts: dict[str, Tensor], config: dict[str, Any]) -> FourBits:
    """qweight: [K / 8, N], qzeros: [groups, N / 8], scales: [groups, N]; the older layout stores zero - 1."""
    zero = _words(parts["qzeros"]).T.to(torch.int16) + (config.get("checkpoint_format") != "gptq_v2")
    return FourBits(_words(parts["qweight"].T.contiguous()), parts["scales"].T, zero, parts.get("g_idx"))


def _awq(parts: dict[str, Tensor], config: dict[str, Any]) -> FourBits:
    """qweight: [K, N / 8], qzeros: [groups, N / 8], scales: [groups, N]."""
    back = torch.tensor(_AWQ_ORDER).argsort()

    def columns(packed: Tensor) -> Tensor:
        return _words(packed).unflatten(1, (-1, 8))[..., back].flatten(1).T.contiguous()

    return FourBits(columns(parts["qweight"]), parts["scales"].T, columns(parts["qzeros"]))


def _compressed(parts: dict[str, Tensor], config: dict[str, Any]) -> FourBits:
    """weight_packed: [N, K / 8], weight_scale: [N, groups], weight_zero_point: [N / 8, groups], or 8."""
    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    unpacked = torch.full(scale.shape, 8) if zero is None else _words(zero.T.contiguous()).T[: len(scale)]
    q = _words(parts["weight_packed"])[:, : int(parts["weight_shape"][1])]
    return FourBits(q, scale, unpacked, parts.get("weight_g_idx"))


def _gptq_reason(config: dict[str, Any]) -> str | None:
    return None if config.get("bits") == 4 else f"{config.get('bits')} bits"


def _awq_reason(config: dict[str, Any]) -> str | None:
    version = str(config.get("version", "gemm")).lower()
    return _gptq_reason(config) or (None if version == "gemm" else f"the layout {version!r}")


def _compressed_reason(config: dict[str, Any]) -> str | None:
    groups = list(dict(config.get("config_groups") or {}).values())
    weights = [dict(group.get("weights") or {}) for group in groups]
    if config.get("format") != "pack-quantized" or len(groups) != 1:
        return f"the format {config.get('format')!r} with {len(groups)} groups of layers"
    if weights[0].get("num_bits") != 4 or weights[0].get("type", "int") != "int":
        return f"{weights[0].get('num_bits')} bits of type {weights[0].get('type')}"
    return "quantised activations" if groups[0].get("input_activations") else None


_METHODS: dict[str, tuple[str, Reader, Callable[[dict[str, Any]], str | None]]] = {
    "gptq": ("qweight", _gptq, _gptq_reason),
    "awq": ("qweight", _awq, _awq_reason),
    "compressed-tensors": ("weight_packed", _compressed, _compressed_reason),
}


def method_of(config: Any) -> str | None:
    """The method of a model's configuration, if it is one of these."""
    method = dict(getattr(config, "quantization_config", None) or {}).get("quant_method")
    return method if method in _METHODS else None


def blocks(name: str, found: FourBits) -> tuple[Tensor, str]:
    """Blocks [N, bytes of a row] and their format. Raises FormatError, naming the weight."""
    (n, k), groups = found.q.shape, found.scale.shape[1]
    if found.scale.shape != (n, groups) or found.zero.shape != (n, groups) or groups == 0 or k % groups:
        shapes = f"{tuple(found.scale.shape)} scales, {tuple(found.zero.shape)} zeros"
        raise quant.FormatError(f"{name}: {shapes} do not fit a weight {(n, k)}")
    size = k // groups
    if size % quant.STEP:
        raise quant.FormatError(f"{name}: groups of {size} values, which {quant.STEP} does not divide")
    if found.order is not None and not torch.equal(found.order.long(), torch.arange(k) // size):
        raise quant.FormatError(f"{name}: groups are in the order of activations (act-order, desc_act)")
    group = math.gcd(size, 128)
    scale = found.scale.float().repeat_interleave(size // group, 1)
    zero = found.zero.float().repeat_interleave(size // group, 1)
    return quant.join_i4(found.q, scale, -scale * zero, group), f"i4_{group}"


def read(folder: Path, config: Any, tokenizer: Any) -> QuantisedFolder:
    """The model in ``folder``, whose ``config`` says one of these methods.

    Raises FormatError for weights of another kind than this page's, WeightsError where they do not fit the
    model.
    """
    from transformers import AutoModelForCausalLM

    settings = dict(config.quantization_config)
    method = settings["quant_method"]
    mark, reader, reason = _METHODS[method]
    if (why := reason(settings)) is not None:
        raise quant.FormatError(f"{method} weights with {why}: only integers of four bits in groups are read")
    del config.quantization_config
    dtype = config.dtype or torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parts: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in _tensors(folder):
        owner, _, leaf = name.rpartition(".")
        linear = _linear(model, owner)
        if linear is not None and leaf not in ("weight", "bias"):
            parts.setdefault(owner, {})[leaf] = tensor
        else:
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    formats = {}
    for owner, tensors in parts.items():
        if mark not in tensors:
            raise WeightsError(f"{owner}: the file has {', '.join(sorted(tensors))}, and no {mark}")
        state[f"{owner}.weight"], formats[owner] = blocks(owner, reader(tensors, settings))
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    return assembled(model, tokenizer, {n: t for n, t in state.items() if n in known}, formats)


def _linear(model: nn.Module, name: str) -> nn.Module | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) else None


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    import safetensors

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} holds no safetensors")
    for path in files:
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dictionary)
                yield name, file.get_tensor(name)
