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
    MOVE = "data movement"  # copies elements; where two go to one place, the model itself leaves it open
    # Correctly rounded operations on an element: the same bits in any compiled loop. Eager roots of fp32 on a
    # CPU may be a library's, which are not: what is computed eagerly takes those of codegen/ops/roots.py.
    EXACT = "exact pointwise"
    TRANSCENDENTAL = "transcendental pointwise"  # exp, tanh, ...: vector and scalar code round differently
    EXACT_REDUCTION = "exact reduction"  # maxima, integer sums: the order cannot be seen
    TIES = "a choice among equals in unknown order"  # top-k, median, ...: which of equal elements is taken
    REDUCTION = "reduction of unknown order"
    SIZE = "size arithmetic"
    UNKNOWN = "unknown"


UNPLACED = (Kind.TIES, Kind.REDUCTION, Kind.UNKNOWN)
# Neither ours nor exact: the bits hang on who computes.
FOREIGN = frozenset({Kind.TRANSCENDENTAL, *UNPLACED})


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names of functions, methods and aten operators, those that write in place without their last underscore.
_VIEW = _names(
    "view reshape expand transpose permute unsqueeze squeeze chunk split narrow select unbind t flatten "
    "unflatten movedim moveaxis swapaxes swapdims as_strided detach expand_as view_as reshape_as diagonal "
    "split_with_sizes tensor_split view_as_complex view_as_real _add_batch_dim _remove_batch_dim hsplit "
    "vsplit dsplit ravel slice alias lift_fresh real imag"
)
_MOVE = _names(
    "cat concat concatenate clone contiguous gather index_select masked_fill where tril triu embedding "
    "repeat tile stack roll flip fliplr flipud rot90 repeat_interleave index_copy copy scatter zeros ones "
    "full arange empty tensor zeros_like ones_like full_like empty_like new_zeros new_ones new_full "
    "new_empty new_tensor pad constant_pad_nd one_hot take take_along_dim setitem index_put index_fill "
    "fill zero hstack vstack dstack column_stack scalar_tensor eye meshgrid broadcast_to "
    "broadcast_tensors masked_scatter masked_select nonzero to_dense diag diag_embed select_scatter "
    "slice_scatter diagonal_scatter block_diag unfold _c10d_functional.wait_tensor "
    "_c10d_functional.all_gather_into_tensor from_local to_local"
)
_EXACT = _names(
    "add sub mul div neg abs square sqrt rsqrt reciprocal relu clamp maximum minimum fmax fmin eq ne lt "
    "le gt ge to _to_copy floor ceil round trunc sign sgn rsub and_ or_ xor invert not_ logical_and "
    "logical_or logical_not logical_xor isnan isinf isfinite isneginf isposinf floor_divide floordiv "
    "remainder mod fmod bitwise_and bitwise_or bitwise_not bitwise_xor bitwise_left_shift "
    "bitwise_right_shift iadd isub imul itruediv ifloordiv imod iand ior ixor clamp_min clamp_max clip "
    "subtract multiply divide true_divide negative positive absolute greater less greater_equal "
    "less_equal not_equal copysign signbit heaviside frac float half bfloat16 double long int bool "
    "type_as type bucketize searchsorted diff __and__ __or__ __invert__ __rsub__ nan_to_num outer rshift "
    "lshift isclose isin threshold hardshrink"
)
_TRANSCENDENTAL = _names(
    "exp log cos sin tanh sigmoid silu gelu softplus erf erfc expm1 log1p pow float_power mish elu celu "
    "selu leaky_relu prelu hardswish exp2 log2 log10 tan atan asin acos atan2 asinh acosh atanh sinh cosh "
    "logsigmoid log_sigmoid hardsigmoid xlogy rpow hardtanh relu6 logit softsign tanhshrink softshrink "
    "glu polar addcmul addcdiv lerp logaddexp logaddexp2 sinc hypot erfinv lgamma digamma expit ldexp "
    "deg2rad rad2deg"
)
_EXACT_REDUCTION = _names(
    "amax amin argmax argmin aminmax max min any all count_nonzero equal item tolist unique "
    "unique_consecutive msort allclose"
)
# Which of equal elements comes first, or is the one; values alone are exact.
_TIES = _names("topk sort argsort kthvalue median nanmedian mode cummax cummin")
_REDUCTION = _names(
    "sum mean softmax log_softmax softmin logsumexp var std var_mean std_mean norm cumsum cumprod prod "
    "nansum nanmean layer_norm rms_norm group_norm batch_norm instance_norm local_response_norm renorm "
    "matmul mm bmm linear addmm einsum inner vdot dot mv addmv addbmm addr baddbmm tensordot chain_matmul "
    "bilinear imatmul __matmul__ __rmatmul__ vecdot conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d convolution sdpa scaled_dot_product_attention cross_entropy "
    "nll_loss mse_loss l1_loss kl_div normalize logcumsumexp index_add index_reduce scatter_add "
    "scatter_reduce put interpolate avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d trapezoid trapz cumulative_trapezoid histc bincount linalg_vector_norm "
    "linalg_norm vector_norm matrix_norm _grouped_mm grouped_mm multinomial cosine_similarity "
    "pairwise_distance cdist dist trace cov corrcoef quantile nanquantile embedding_bag "
    "multi_head_attention_forward chunk_gated_delta_rule selective_scan fft_fft fft_ifft fft_rfft "
    "fft_irfft"
)
_KINDS: tuple[tuple[frozenset[str], Kind], ...] = (
    (_VIEW, Kind.VIEW),
    (_MOVE, Kind.MOVE),
    (_EXACT, Kind.EXACT),
    (_TRANSCENDENTAL, Kind.TRANSCENDENTAL),
    (_EXACT_REDUCTION, Kind.EXACT_REDUCTION),
    (_TIES, Kind.TIES),
    (_REDUCTION, Kind.REDUCTION),
)
_BY_NAME: dict[str, Kind] = {name: k for names, k in _KINDS for name in names}


def kind_of_name(name: str) -> Kind:
    """The kind of a function, method or ``aten`` operator as far as its name tells; UNKNOWN for all others.

    A function in place is of the kind of the one that is not; an overload of ``aten`` is of its operator's.
    """
    name = name.removeprefix("aten::").removeprefix("aten.")
    if (found := _BY_NAME.get(name)) is not None:
        return found
    name = name.split(".")[0]
    in_place = name.endswith("_") and not name.endswith("__")
    return _BY_NAME.get(name.removesuffix("_") if in_place else name, Kind.UNKNOWN)


def plain_name(node: fx.Node) -> str:
    """Canonical name, or the target's own."""
    found = g.name(node)
    if found:
        return found
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return str(node.target)
    # Dynamo runs `np.sqrt` of a number as `wrapped_sqrt`.
    return str(getattr(node.target, "__name__", node.target)).removeprefix("wrapped_")


def _has_tensor_index(node: fx.Node) -> bool:
    index = node.args[1] if len(node.args) > 1 else None
    parts: Any = index if isinstance(index, (tuple, list)) else (index,)
    return any(isinstance(p, (list, Tensor)) or g.tensor(p) is not None for p in parts)


def _integral(node: fx.Node) -> bool:
    """Every tensor that goes in and comes out is of integers or booleans."""
    values = [g.tensor(n) for n in (node, *node.all_input_nodes)]
    return all(not t.is_floating_point() and not t.is_complex() for t in values if t is not None)


def _accumulates(node: fx.Node, name: str) -> Kind | None:
    """Of a call that writes elements to places: whether it adds them to what is there, or to each other."""
    base = name.removeprefix("aten::").removeprefix("aten.").split(".")[0].rstrip("_")
    if base in ("index_put", "put"):
        flag = node.kwargs.get("accumulate", g.arg(node, 3))
        return Kind.MOVE if flag in (None, False) else Kind.REDUCTION
    if base in ("scatter", "scatter_reduce", "index_reduce"):
        how = node.kwargs.get("reduce", g.arg(node, 4))
        if how in ("amax", "amin"):
            return Kind.EXACT_REDUCTION
        return Kind.REDUCTION if how is not None or base != "scatter" else None
    if base == "embedding" and (g.arg(node, 3) or node.kwargs.get("max_norm")) is not None:
        return Kind.REDUCTION  # it scales rows by their norm first
    return None


def _row_decides(node: fx.Node) -> bool:
    """A top-k on a CPU: which of equals it takes is a function of the row (``tests/passes/test_topk.py``)."""
    x = g.tensor(g.arg(node))
    return plain_name(node) == "topk" and x is not None and x.device.type == "cpu"


def _stable(node: fx.Node) -> bool:
    """A sort that keeps equals in their order."""
    return node.kwargs.get("stable") is True


def _values_only(node: fx.Node) -> bool:
    """Nobody reads which elements were taken."""
    if isinstance(g.value(node), Tensor):
        return plain_name(node) in ("median", "nanmedian")
    taken = [user.args[1] if len(user.args) > 1 else None for user in node.users]
    is_access = all(g.name(user) == "getitem" or user.target is getattr for user in node.users)
    return is_access and all(part in (0, "values") for part in taken)


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
    ).startswith("llm42."):
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
    found = _accumulates(node, name) or kind_of_name(name)
    if found not in (Kind.VIEW, Kind.MOVE) and isinstance(value, Tensor) and value.is_complex():
        return Kind.UNKNOWN  # libraries round complex numbers alone and in vectors differently
    if found is Kind.TIES:
        settled = _row_decides(node) or _stable(node) or _values_only(node)
        return Kind.EXACT_REDUCTION if settled else Kind.TIES
    if found is Kind.TRANSCENDENTAL and name == "pow" and _integral(node):
        return Kind.EXACT
    if found is Kind.REDUCTION and tensors and _integral(node):
        return Kind.EXACT_REDUCTION
    if found is not Kind.UNKNOWN:
        return found
    if not tensors and (name.startswith("_") or value is None):
        return Kind.SIZE  # context managers, logging, what neither reads nor gives a tensor
    return Kind.UNKNOWN
