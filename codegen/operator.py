"""What an operator is: declared once, in one file of ``codegen/ops``.

The declaration is a function whose typed signature is the schema and whose body is the specification::

    @operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.ROWS)
    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        '''x: [..., H], weight: [H] → [..., H].'''
        y = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
        return y if weight is None else y * weight.double()

    @rms_norm.fake                  # shapes, dtypes and strides, without data
    def _(x, weight, eps): ...

    @rms_norm.simulator(LANES)      # that order, step by step, in plain torch
    def _(x, weight, eps): ...

    @rms_norm.gradient(setup)       # for torch.library.register_autograd
    def _(ctx, grad): ...

Who computes it stands elsewhere, in a folder for each target; :meth:`Operator.implementation` takes what is
composed of other operators, and :meth:`Operator.compiled` the sources of what is not in the tree.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import torch
from torch.library import infer_schema
from torch.utils._pytree import tree_leaves

from llm42c.codegen.examples import Numbers
from llm42c.codegen.order import COPY, Order

NAMESPACE = "llm42"
_F = TypeVar("_F", bound=Callable[..., Any])


class Tokens(enum.Enum):
    """How a call divides over the tokens of its rows: what each part of the rows may be computed from."""

    POINTWISE = "each element from the elements that it is broadcast with"
    ROWS = "along the last dimension of the first operand; every other dimension may be divided"
    REDUCED = "over the dimensions that it is told; every other may be divided"
    ALONG = "along its argument `dim`; every other may be divided"
    VIEW = "a view that keeps each row together, dimensions in any order"
    PART = "a part of the elements, or all, dimensions in their order"
    RESHAPE = "all elements in row-major order, as another shape"
    SIZED = "a fresh tensor of a size that it is told"
    JOINED = "tensors one behind another along its argument `dim`"
    PICKED = "elements picked along its argument `dim`; every other may be divided"
    PRODUCT = "a product of the rows of the first operand with the second"
    ADDED_PRODUCT = "the first operand plus a product of the second's rows with the third"


class Traffic(enum.Enum):
    """What travels between the ranks of a group."""

    SUM = "summands"
    GATHER = "parts"


@dataclass(frozen=True)
class Cost:
    """What one call moves, in bytes, and computes, in floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __str__(self) -> str:
        return f"{self.bytes / 1e6:.3g} MB, {self.flops / 1e6:.3g} MFLOP"


class Operator:
    """One operator. Made by :func:`operator`, and completed by its decorators.

    ``orders``: what fixes its bits on each target.
    ``tokens``: how it divides over tokens; None where passes need a rule for it alone.
    ``product``: of a product of the rows of its first argument with a weight, the work of a model: the
    weight's columns, from the arguments.
    ``mutates``: names of the arguments that are written to.
    ``traffic``: what it sends to other ranks; None if nothing.
    ``examples``: argument lists that show its bits, for every test of operators (``codegen/examples.py``).

    ``reference`` is the specification on plain torch tensors: in fp64, or with exactly rounded steps. It
    calls no kernel. Of a collective it takes the tensors of all ranks.
    A gradient is Python code that runs at every call outside ``torch.inference_mode()``, also under
    ``no_grad``, and costs microseconds; torch warns when something is differentiated through an operator
    that has none.
    """

    def __init__(
        self,
        declared: Callable[..., Any],
        orders: Mapping[str, Order],
        tokens: Tokens | None,
        product: Callable[..., int] | None,
        mutates: tuple[str, ...],
        traffic: Traffic | None,
        examples: Callable[[Numbers], Iterable[tuple[Any, ...]]] | None,
    ) -> None:
        self.name = declared.__name__
        self.__doc__ = declared.__doc__
        self.module = declared.__module__
        self.orders = dict(orders)
        self.tokens, self.product, self.mutates, self.traffic = tokens, product, mutates, traffic
        self.examples = examples
        self.reference = declared
        # Sizes are plain integers: a kernel is specialised by them, or does not know them at all.
        inferred = infer_schema(declared, mutates_args=mutates, op_name=self.name)
        self.schema = inferred.replace("SymInt", "int")
        self.meta: Callable[..., Any] = self._without_fake
        self.simulators: dict[Order, Callable[..., Any]] = {}
        self.backward: Callable[..., Any] | None = None
        self.setup_context: Callable[..., Any] | None = None
        self.implementations: dict[str, Callable[..., Any]] = {}
        self.compiled_from: dict[str, tuple[Path, ...]] = {}

    def __repr__(self) -> str:
        return f"<operator {self.schema}>"

    def _without_fake(self, *args: Any) -> Any:
        raise NotImplementedError(f"{self.qualname} has no fake: write one under @{self.name}.fake")

    @property
    def qualname(self) -> str:
        return f"{NAMESPACE}::{self.name}"

    @property
    def overload(self) -> Any:
        """The ``torch.ops`` overload (after ``registry.define``)."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @property
    def moves(self) -> bool:
        """It copies elements and computes nothing."""
        return set(self.orders.values()) == {COPY}

    def cost(self, args: Sequence[Any], results: Any) -> Cost:
        """Of one call: every tensor that goes in or comes out moves once; one operation an element of the
        result, or those of the product. Tensors may be fakes."""
        made = tree_leaves(results)
        moved = [x for x in (*tree_leaves(args), *made) if isinstance(x, torch.Tensor)]
        flops = 2 * args[0].numel() * self.product(*args) if self.product else sum(x.numel() for x in made)
        return Cost(float(sum(x.nbytes for x in moved)), float(flops))

    def fake(self, function: _F) -> _F:
        """Decorator: shapes, dtypes and strides of the result, from arguments without data."""
        self.meta = function
        return function

    def specification(self, function: _F) -> _F:
        """Decorator: the reference where its arguments are not those of the call, as of a collective."""
        self.reference = function
        return function

    def simulator(self, order: Order) -> Callable[[_F], _F]:
        """Decorator: ``order`` step by step, of what ``codegen/simulate.py`` offers; takes the arguments of
        the reference. Every implementation with this order has its bits."""

        def decorate(function: _F) -> _F:
            self.simulators[order] = function
            return function

        return decorate

    def gradient(self, setup_context: Callable[..., Any]) -> Callable[[_F], _F]:
        """Decorator: the backward formula."""

        def decorate(function: _F) -> _F:
            self.backward, self.setup_context = function, setup_context
            return function

        return decorate

    def implementation(self, *targets: str) -> Callable[[_F], _F]:
        """Decorator: what computes it on ``targets`` by calling other operators."""

        def decorate(function: _F) -> _F:
            self.implementations.update(dict.fromkeys(targets, function))
            return function

        return decorate

    def compiled(self, target: str, *sources: Path) -> None:
        """What computes it on ``target`` is compiled from ``sources``, as the target compiles its own, when
        its operators are loaded; they register themselves with torch. For operators of other packages."""
        self.compiled_from[target] = sources


def operator(
    *,
    orders: Mapping[str, Order],
    tokens: Tokens | None = None,
    product: Callable[..., int] | None = None,
    mutates: tuple[str, ...] = (),
    traffic: Traffic | None = None,
    examples: Callable[[Numbers], Iterable[tuple[Any, ...]]] | None = None,
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: the function declares an operator of its name. See :class:`Operator`."""

    def declare(function: Callable[..., Any]) -> Operator:
        return Operator(function, orders, tokens, product, mutates, traffic, examples)

    return declare


@dataclass(frozen=True)
class Implementation:
    """``function`` computes the operator ``name`` on ``target``, with the operator's arguments.

    ``kernels``: what it launches on a device that need not be here, for compilation ahead of time.
    """

    name: str
    target: str
    function: Callable[..., Any]
    kernels: Callable[..., Iterable[Any]] | None = None


def implements(
    name: str, target: str, *, kernels: Callable[..., Iterable[Any]] | None = None
) -> Callable[[_F], _F]:
    """Decorator: the function computes the operator ``name`` on ``target``; ``registry`` finds it.

    ``kernels(device)``: for "cuda", the ``triton.catalog.Kernel``s that it launches.
    """

    def mark(function: _F) -> _F:
        function.__dict__["llm42_implements"] = Implementation(name, target, function, kernels)
        return function

    return mark


def implementations_in(module: ModuleType) -> list[Implementation]:
    """What the functions of a module implement (not of those that it imports)."""
    marks = [vars(x).get("llm42_implements") for x in vars(module).values() if isinstance(x, FunctionType)]
    return [m for m in marks if m is not None and m.function.__module__ == module.__name__]


def operators_in(module: ModuleType) -> list[Operator]:
    """The operators that a module declares (not those that it imports)."""
    return [x for x in vars(module).values() if isinstance(x, Operator) and x.module == module.__name__]
