"""What is known of torch's own functions, by name: all that passes and token weaving assume of them.

One name stands for ``torch.add``, ``Tensor.add``, ``Tensor.add_`` and ``aten::add.Tensor``. What torch says
of itself is asked of it: arguments (:func:`signature`), random numbers (:func:`is_random`), and what an
overload writes to (``graph.mutated_arguments``). The table holds what torch does not say: how the bits of an
element come about, and how a call divides over tokens. What has no row is unknown, and refused by whoever
needs to know. ``tests/passes/test_traits.py`` holds the table against torch's tags and aliasing, and against
what the functions do.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llm42c.codegen.operator import Tokens
from llm42c.codegen.ops.registry import our_operator


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


@dataclass(frozen=True)
class Traits:
    """``tokens``: how a call divides over tokens; None where it has a rule of its own, or none.
    ``same``: the result holds the elements of the first argument in their places, perhaps in another dtype.
    """

    kind: Kind
    tokens: Tokens | None = None
    same: bool = False


# Functions, methods and aten operators; those that write in place without their last underscore.
_TABLE: dict[Traits, str] = {
    Traits(Kind.VIEW, Tokens.POINTWISE, same=True): "alias detach lift_fresh",
    Traits(Kind.VIEW, Tokens.VIEW): """
        diagonal dsplit expand expand_as hsplit imag moveaxis movedim permute real swapaxes swapdims t
        tensor_split transpose unbind view_as_complex view_as_real vsplit""",
    Traits(Kind.VIEW, Tokens.PART): "chunk narrow select slice split split_with_sizes squeeze unsqueeze",
    Traits(Kind.VIEW, Tokens.RESHAPE): "_unsafe_view flatten ravel reshape reshape_as unflatten view view_as",
    Traits(Kind.VIEW): "_add_batch_dim _remove_batch_dim as_strided",
    Traits(Kind.MOVE, Tokens.POINTWISE, same=True): "clone contiguous lift_fresh_copy",
    Traits(Kind.MOVE, Tokens.POINTWISE): """
        copy empty_like fill full_like masked_fill ones_like where zeros_like""",
    Traits(Kind.MOVE, Tokens.SIZED): "new_empty new_full new_ones new_zeros",
    Traits(Kind.MOVE, Tokens.JOINED): "cat concat concatenate",
    Traits(Kind.MOVE, Tokens.PICKED): "gather index_select scatter",
    Traits(Kind.MOVE, Tokens.REDUCED): "stack",
    Traits(Kind.MOVE, Tokens.VIEW): "one_hot",
    Traits(Kind.MOVE): """
        arange block_diag broadcast_tensors broadcast_to column_stack constant_pad_nd diag diag_embed
        diagonal_scatter dstack embedding empty eye flip fliplr flipud from_local full hstack index_copy
        index_fill index_put masked_scatter masked_select meshgrid new_tensor nonzero ones pad repeat
        repeat_interleave roll rot90 scalar_tensor select_scatter setitem slice_scatter take take_along_dim
        tensor tile to_dense to_local tril triu unfold vstack zero zeros _c10d_functional::wait_tensor
        _c10d_functional::all_gather_into_tensor""",
    Traits(Kind.EXACT, Tokens.POINTWISE, same=True): """
        _to_copy bfloat16 double float half int long to type type_as""",
    Traits(Kind.EXACT, Tokens.POINTWISE): """
        __and__ __invert__ __or__ __rsub__ abs absolute add and_ bitwise_and bitwise_left_shift bitwise_not
        bitwise_or bitwise_right_shift bitwise_xor bool ceil clamp clamp_max clamp_min clip copysign div
        divide eq floor floor_divide floordiv fmax fmin fmod frac ge greater greater_equal gt hardshrink
        heaviside iadd iand ifloordiv imod imul invert ior isclose isfinite isinf isnan isneginf isposinf isub
        itruediv ixor le less less_equal logical_and logical_not logical_or logical_xor lshift lt maximum
        minimum mod mul multiply nan_to_num ne neg negative not_ not_equal or_ positive reciprocal relu
        remainder round rshift rsqrt rsub sgn sign signbit sqrt square sub subtract threshold true_divide
        truediv trunc xor""",
    Traits(Kind.EXACT): "bucketize diff isin outer searchsorted",
    Traits(Kind.TRANSCENDENTAL, Tokens.POINTWISE): """
        acos acosh addcdiv addcmul asin asinh atan atan2 atanh celu cos cosh deg2rad digamma elu erf erfc
        erfinv exp exp2 expit expm1 float_power gelu hardsigmoid hardswish hardtanh hypot ldexp leaky_relu
        lerp lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logit logsigmoid mish polar pow
        rad2deg relu6 rpow selu sigmoid silu sin sinc sinh softplus softshrink softsign tan tanh tanhshrink
        xlogy""",
    Traits(Kind.TRANSCENDENTAL): "glu prelu",
    Traits(Kind.EXACT_REDUCTION, Tokens.REDUCED): "all amax amin any argmax argmin max min",
    Traits(Kind.EXACT_REDUCTION): """
        allclose aminmax count_nonzero equal item msort tolist unique unique_consecutive""",
    # Which of equal elements comes first, or is the one; values alone are exact.
    Traits(Kind.TIES, Tokens.REDUCED): "topk",
    Traits(Kind.TIES, Tokens.ALONG): "argsort sort",
    Traits(Kind.TIES): "cummax cummin kthvalue median mode nanmedian",
    Traits(Kind.REDUCTION, Tokens.REDUCED): "logsumexp mean norm prod std sum var",
    Traits(Kind.REDUCTION, Tokens.ROWS): "_fused_rms_norm layer_norm native_layer_norm rms_norm",
    Traits(Kind.REDUCTION, Tokens.ALONG): """
        _log_softmax _safe_softmax _softmax cumprod cumsum log_softmax logcumsumexp softmax""",
    Traits(Kind.REDUCTION, Tokens.PRODUCT): "bmm linear matmul mm mv",
    Traits(Kind.REDUCTION, Tokens.ADDED_PRODUCT): "addmm baddbmm",
    Traits(Kind.REDUCTION, Tokens.PICKED): "scatter_add",
    Traits(Kind.REDUCTION): """
        __matmul__ __rmatmul__ _grouped_mm adaptive_avg_pool1d adaptive_avg_pool2d addbmm addmv addr
        avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear bincount cdist chain_matmul
        chunk_gated_delta_rule conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
        convolution corrcoef cosine_similarity cov cross_entropy cumulative_trapezoid dist dot einsum
        embedding_bag fft_fft fft_ifft fft_irfft fft_rfft group_norm grouped_mm histc imatmul index_add
        index_reduce inner instance_norm interpolate kl_div l1_loss linalg_norm linalg_vector_norm
        local_response_norm matrix_norm mse_loss multi_head_attention_forward multinomial nanmean nanquantile
        nansum nll_loss normalize pairwise_distance put quantile renorm scaled_dot_product_attention
        scatter_reduce sdpa selective_scan softmin std_mean tensordot trace trapezoid trapz var_mean vdot
        vecdot vector_norm""",
    Traits(Kind.UNKNOWN, Tokens.POINTWISE): "dropout native_dropout",
}
TRAITS: dict[str, Traits] = {name: traits for traits, names in _TABLE.items() for name in names.split()}
_NOTHING = Traits(Kind.UNKNOWN)
# Functions of torch.nn.functional that draw random numbers under a name that no operator of ATen has.
_RANDOM = frozenset(
    {
        *("dropout1d", "dropout2d", "dropout3d", "gumbel_softmax", "multi_head_attention_forward"),
        *(f"fractional_max_pool{d}d{also}" for d in (2, 3) for also in ("", "_with_indices")),
    }
)
# What arguments are called here where functions differ.
_RENAMED = {"self": "input", "A": "input", "x": "input", "axis": "dim", "keepdims": "keepdim"}


def functional(name: str) -> str:
    """``add`` for ``add_``."""
    in_place = name.endswith("_") and not name.endswith("__") and name not in TRAITS
    return name.removesuffix("_") if in_place else name


def traits_of(name: str) -> Traits:
    """Of what ``graph.called`` calls so, as far as its name tells; of what has no row, nothing."""
    return TRAITS.get(functional(name), _NOTHING)


def tokens_of(name: str) -> Tokens | None:
    """How a call divides over tokens, of an operator of ours too."""
    ours = our_operator(name)
    return traits_of(name).tokens if ours is None else ours.tokens


@functools.cache
def is_random(name: str) -> bool:
    """A function of torch of this name draws random numbers, or does unless an argument says otherwise."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()
    tagged = any(torch.Tag.nondeterministic_seeded in getattr(packet, o).tags for o in overloads)
    return tagged or name in _RANDOM


@functools.cache
def signature(function: Callable[..., Any]) -> tuple[tuple[str, Any], ...]:
    """(name, default or None) of the arguments of a function of torch, in their order.

    The longest form of those that a function has; arguments of one meaning have one name.
    """
    if isinstance(function, torch._ops.OpOverload):
        called, arguments = function._schema.name.partition("::")[2], function._schema.arguments
        found = [(a.name, a.default_value if a.has_default_value() else None) for a in arguments]
        return tuple(found if function.namespace != "aten" else ((renamed(n, called), d) for n, d in found))
    called = function.__name__
    try:
        parameters = inspect.signature(function).parameters.values()
        found = [(p.name, None if p.default is p.empty else p.default) for p in parameters]
    except (TypeError, ValueError):  # of a function in C
        forms = [
            [(a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments]
            for schema in torch._C._jit_get_schemas_for_operator(f"aten::{called}")
            if not any(a.is_out or a.name == "out_dtype" or "str[" in str(a.type) for a in schema.arguments)
        ]
        found = max(forms, key=len)
    return tuple((renamed(name, called), default) for name, default in found if name != "out")


def renamed(name: str, called: str) -> str:
    """What the argument ``name`` of the function ``called`` is called here."""
    if called in ("mm", "bmm") and name == "mat2":
        return "other"
    return "ord" if called in ("norm", "normalize") and name == "p" else _RENAMED.get(name, name)
