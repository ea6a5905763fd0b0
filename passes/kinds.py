"""What kind of computation a node is, as far as the order of its arithmetic is concerned."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor, fx

from llm42c.passes import graph as g


class Kind(enum.Enum):
    """How the bits of one output element come about."""

    OPERATOR = "llm42 operator"  # order of reduction fixed by the operator
    VIEW = "view"
    MOVE = "data movement"  # copies elements
    EXACT = "exact pointwise"  # one correctly rounded operation an element: the same bits in any loop
    TRANSCENDENTAL = "transcendental pointwise"  # exp, tanh, ...: vector and scalar code round differently
    EXACT_REDUCTION = "exact reduction"  # maxima, integer sums: the order cannot be seen
    REDUCTION = "reduction of unknown order"
    SIZE = "size arithmetic"
    UNKNOWN = "unknown"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEW = _names(
    "view reshape expand transpose permute unsqueeze squeeze chunk split narrow select unbind t flatten "
    "unflatten movedim as_strided detach expand_as view_as diagonal split_with_sizes tensor_split ravel "
    "aten.slice _add_batch_dim _remove_batch_dim view_as_complex view_as_real"
)
_MOVE = _names(
    "cat concat clone contiguous gather index_select masked_fill where tril triu embedding repeat stack "
    "roll flip repeat_interleave index_copy_ copy_ scatter scatter_ zeros ones full arange empty tensor "
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor pad "
    "one_hot take_along_dim setitem masked_fill_ index_put_ fill_ zero_ hstack vstack scalar_tensor eye "
    "_c10d_functional.wait_tensor _c10d_functional.all_gather_into_tensor from_local to_local "
    "meshgrid broadcast_to broadcast_tensors masked_scatter masked_scatter_ index_add_ nonzero to_dense"
)
_EXACT = _names(
    "add sub mul div neg abs square sqrt rsqrt reciprocal relu clamp maximum minimum eq ne lt le gt ge "
    "to floor ceil round trunc sign rsub and_ or_ xor invert not_ logical_and logical_or logical_not "
    "logical_xor isnan isinf isfinite floor_divide floordiv remainder mod fmod bitwise_and bitwise_or "
    "bitwise_not bitwise_xor iadd isub imul itruediv add_ sub_ mul_ div_ clamp_ clamp_min clamp_max relu_ "
    "float half bfloat16 double long int bool type_as type bucketize searchsorted diff __and__ __or__ "
    "greater greater_equal less less_equal not_equal __invert__ __rsub__ nan_to_num outer rshift lshift"
)
_TRANSCENDENTAL = _names(
    "exp log cos sin tanh sigmoid silu gelu softplus erf expm1 log1p pow mish elu selu leaky_relu "
    "hardswish exp2 log2 sin_ cos_ exp_ tan atan asin acos sinh cosh logsigmoid hardsigmoid xlogy rpow "
    "log_sigmoid hardtanh relu6 logit softsign polar"
)
_EXACT_REDUCTION = _names(
    "amax amin argmax argmin max min topk sort argsort any all cummax cummin count_nonzero equal item tolist"
)
_REDUCTION = _names(
    "sum mean softmax log_softmax logsumexp var std var_mean norm cumsum cumprod prod layer_norm "
    "rms_norm group_norm batch_norm instance_norm matmul mm bmm linear addmm einsum conv1d conv2d "
    "conv3d conv_transpose1d sdpa baddbmm dot tensordot bilinear cross_entropy nll_loss mse_loss "
    "normalize logcumsumexp index_add scatter_add scatter_add_ scatter_reduce interpolate avg_pool1d "
    "avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d trapezoid histc bincount linalg_vector_norm "
    "vector_norm _grouped_mm grouped_mm multinomial baddbmm_ addmm_ cosine_similarity "
    "multi_head_attention_forward cumsum_ addbmm mv addmv chunk_gated_delta_rule selective_scan"
)


def plain_name(node: fx.Node) -> str:
    """Canonical name, or the target's own."""
    found = g.name(node)
    if found:
        return found
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _has_tensor_index(node: fx.Node) -> bool:
    index = node.args[1] if len(node.args) > 1 else None
    parts: Any = index if isinstance(index, (tuple, list)) else (index,)
    return any(isinstance(p, (list, Tensor)) or g.tensor(p) is not None for p in parts)


def _integral(node: fx.Node) -> bool:
    """Every tensor that goes in and comes out is of integers or booleans."""
    values = [g.tensor(n) for n in (node, *node.all_input_nodes)]
    return all(not t.is_floating_point() and not t.is_complex() for t in values if t is not None)


def _redistribution(node: fx.Node) -> Kind:
    """Of a DTensor: moves its parts, unless they are summands.

    A looked-up row of a divided embedding is one rank's row plus the others' zeros: an exact sum.
    """
    placements = getattr(g.value(node.args[0]), "placements", None)
    if placements is None:
        return Kind.UNKNOWN
    return Kind.REDUCTION if any(type(p).__name__ == "Partial" for p in placements) else Kind.MOVE


def kind(node: fx.Node) -> Kind:
    """The kind of a call node."""
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and str(
        node.target
    ).startswith("llm42"):
        return Kind.OPERATOR
    value = g.value(node)
    tensors = [n for n in node.all_input_nodes if g.tensor(n) is not None]
    if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size)):
        return Kind.SIZE
    if isinstance(value, tuple) and value and all(isinstance(v, (int, torch.SymInt)) for v in value):
        return Kind.SIZE  # strides
    name = plain_name(node)
    if name == "getitem":
        return Kind.MOVE if _has_tensor_index(node) else Kind.VIEW
    if name == "getattr":
        return Kind.VIEW if isinstance(value, Tensor) else Kind.SIZE
    if name == "redistribute":
        return _redistribution(node)
    if name in _VIEW:
        return Kind.VIEW
    if name in _MOVE:
        return Kind.MOVE
    if isinstance(value, Tensor) and value.is_complex():
        return Kind.UNKNOWN  # libraries round complex numbers alone and in vectors differently
    if name in _EXACT:
        return Kind.EXACT
    if name in _EXACT_REDUCTION:
        return Kind.EXACT_REDUCTION
    if name in _TRANSCENDENTAL:
        return Kind.EXACT if name == "pow" and _integral(node) else Kind.TRANSCENDENTAL
    if name in _REDUCTION:
        return Kind.EXACT_REDUCTION if tensors and _integral(node) else Kind.REDUCTION
    if not tensors and (name.startswith("_") or value is None):
        return Kind.SIZE  # context managers, logging, what neither reads nor gives a tensor
    return Kind.UNKNOWN
