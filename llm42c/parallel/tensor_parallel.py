"""Dividing a Hugging Face decoder among the ranks of a group, in place, by the model's own plan.

The plan (``base_model_tp_plan`` and the head's ``_tp_plan``) says for every projection whether its outputs or
its inputs are divided. It is followed block by block (an attention, an MLP, a set of experts): a block whose
sizes the group cannot divide is left whole on every rank, which costs its speed and changes nothing else.
The parameters become ordinary smaller parameters, so everything after this, from capture to packed weights,
works as it does for one process; what the ranks owe each other stands in the graph as ``llm42`` operators
that hooks put there:

    colwise                  weight rows and bias divided; the output is this rank's part
    packed_colwise           the same for [gate; up] stacked in one tensor: each half is divided
    rowwise                  weight columns divided; all_reduce of the output, then the bias
    colwise_gather_output    as colwise; all_gather_last of the output
    rowwise_split_input      shard_last of the input, then as rowwise
    moe_tp_experts           all_reduce of the experts' weighted sum

All ranks run the same graph, and hold the same bits after every all_reduce.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llm42c import quantised
from llm42c.codegen.ops import registry
from llm42c.errors import UnsupportedModelError
from llm42c.memory import forget, trim
from llm42c.parallel.ranks import Ranks


@dataclass
class Division:
    """What was divided and what was left whole, by module name; each whole block with its reason."""

    divided: list[str] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """One line: ``divided: 60 modules; whole: model.layers.*.self_attn (9 heads on 2 ranks)``."""
        reasons = {_wildcard(name): reason for name, reason in self.whole.items()}
        whole = "; ".join(f"{name} ({reason})" for name, reason in reasons.items()) or "nothing"
        return f"divided: {len(self.divided)} modules; whole on every rank: {whole}"


_OUTPUTS = ("colwise", "colwise_gather_output", "colwise_rep", "packed_colwise")
_INPUTS = ("rowwise", "rowwise_split_input", "rowwise_rep", "packed_rowwise")
_SUMS = ("moe_tp_experts", "all_reduce")
# An embedding stays whole: looking rows up costs nothing, and dividing it would cost a collective.
_NOTHING = (
    *("replicated_with_grad_allreduce", "replicate", "local_params"),
    *("embedding_rowwise", "embedding_colwise"),
)
_STYLES = frozenset((*_OUTPUTS, *_INPUTS, *_SUMS, *_NOTHING)) - {"packed_rowwise"}


def divide(model: nn.Module, ranks: Ranks) -> Division:
    """Keep this rank's part of ``model``'s parameters and let its forward call the collectives.

    Raises UnsupportedModelError for a model without a plan, or with a style that is not known.
    """
    registry.define()
    division = Division()
    if ranks.size == 1:
        return division
    if formats := quantised.formats(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be divided among ranks: its weights are quantised "
            f"({', '.join(formats)}); run it in one process"
        )
    for block, entries in _blocks(model, _plan(model)).items():
        reason = next((r for e in entries if (r := _indivisible(model, e, ranks.size))), None)
        if reason is not None:
            division.whole[block] = reason
            continue
        for entry in entries:
            _apply(entry, ranks)
            division.divided.append(entry.name)
        trim()
    return division


@dataclass(frozen=True)
class _Entry:
    """One line of the plan for one module (``parameter`` empty) or one parameter of it."""

    name: str
    style: str
    module: nn.Module
    parameter: str = ""


def _plan(model: nn.Module) -> dict[str, str]:
    plan = dict(getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {})
    if not any(style in _INPUTS for style in plan.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no plan for tensor parallelism: run it in one process"
        )
    unknown = sorted(set(plan.values()) - _STYLES)
    if unknown:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be divided among ranks: its plan has the style {unknown[0]!r}"
        )
    return plan


def _wildcard(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _blocks(model: nn.Module, plan: dict[str, str]) -> dict[str, list[_Entry]]:
    """The plan's entries by the module that must be divided as a whole."""
    blocks: dict[str, list[_Entry]] = {}
    for name, module in model.named_modules():
        style = plan.get(_wildcard(name))
        if style is not None:
            block = name if style in _SUMS else name.rpartition(".")[0] or name
            blocks.setdefault(block, []).append(_Entry(name, style, module))
        for parameter, _ in module.named_parameters(recurse=False):
            style = plan.get(_wildcard(f"{name}.{parameter}"))
            if style is not None:
                blocks.setdefault(name, []).append(_Entry(f"{name}.{parameter}", style, module, parameter))
    return blocks


def _width(entry: _Entry) -> int:
    """The size that the ranks divide."""
    weight = getattr(entry.module, entry.parameter or "weight")
    if entry.style in _INPUTS:
        return int(weight.shape[-1])
    rows = int(weight.shape[-2] if weight.dim() > 1 else weight.shape[0])
    return rows // 2 if entry.style == "packed_colwise" else rows


def _indivisible(model: nn.Module, entry: _Entry, size: int) -> str | None:
    """Why the ranks cannot divide the module."""
    if getattr(entry.module, "is_transposed", False) or getattr(entry.module, "has_bias", False):
        return "experts that are stored transposed or have biases"
    if entry.style in _NOTHING or entry.style in _SUMS:
        return None
    parent = model.get_submodule(entry.name.rpartition(".")[0])
    head_dim = getattr(parent, "head_dim", None)
    width = _width(entry)
    if isinstance(head_dim, int) and entry.style in ("colwise", "rowwise") and width % head_dim == 0:
        heads = width // head_dim
        return None if heads % size == 0 else f"{heads} heads on {size} ranks"
    return None if width % size == 0 else f"{width} columns on {size} ranks"


def _apply(entry: _Entry, ranks: Ranks) -> None:
    module, style = entry.module, entry.style
    size, group = ranks.size, ranks.group_name
    if style in _SUMS:
        _after(module, lambda out: torch.ops.llm42.all_reduce(out, group))
    elif entry.parameter:
        _keep(module, entry.parameter, style, ranks)
    elif style in _OUTPUTS:
        _keep(module, "weight", style, ranks)
        _keep(module, "bias", style, ranks)
        module.out_features = module.weight.shape[0]  # type: ignore[assignment,index]
        if style != "colwise":
            _after(module, lambda out: torch.ops.llm42.all_gather_last(out, size, group))
    elif style in _INPUTS:
        _keep(module, "weight", style, ranks)
        module.in_features = module.weight.shape[1]  # type: ignore[assignment,index]
        if style != "rowwise":
            _before(module, lambda x: torch.ops.llm42.shard_last(x, size, group))
        bias = module._parameters.get("bias")
        if bias is not None:  # it is added once, to the sum
            module._parameters["bias"] = None
            module.register_parameter("bias_of_sum", bias)
        _after(module, lambda out: _summed(out, bias, group))


def _summed(out: Tensor, bias: Tensor | None, group: str) -> Tensor:
    total: Tensor = torch.ops.llm42.all_reduce(out, group)
    return total if bias is None else total + bias


def _keep(module: nn.Module, name: str, style: str, ranks: Ranks) -> None:
    """Replace a parameter by this rank's part of it, a copy, so that the whole can be freed."""
    whole = module._parameters.get(name)
    if whole is None:
        return
    dim = -1 if style in _INPUTS else max(whole.dim() - 2, 0)
    pieces = whole.detach().chunk(2, dim) if style == "packed_colwise" else (whole.detach(),)
    own = [piece.chunk(ranks.size, dim)[ranks.rank] for piece in pieces]
    part = torch.cat(own, dim).clone(memory_format=torch.contiguous_format)
    forget(whole)  # read from a mapped file, it would stay there as long as any weight of that file
    module._parameters[name] = nn.Parameter(part, requires_grad=whole.requires_grad)


def _before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    module.register_forward_pre_hook(hook)


def _after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return change(output)

    module.register_forward_hook(hook)
