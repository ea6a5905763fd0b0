"""Large primes in place of symbolic sizes, for the time of a pipeline.

Computing with symbolic shapes costs about a millisecond a call; a decoder of 30 layers has thousands of
calls. So the packed pipeline gives each symbol (T, R) a prime larger than any constant of a model and
runs on ordinary numbers. Nothing is lost: a size is a polynomial in the symbols with non-negative
coefficients below the prime, such a polynomial is determined by its value there, so two sizes that are
equal at the primes are equal for every T and R.

Nothing may bake a prime into an argument; :func:`baked` finds such a fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from llm42c.passes import graph as g

# The square of a size, at eight bytes an element, still fits into an int64. None is near a power of two,
# and no multiple of one is a size that models have.
PRIMES = (433494437, 479001599, 387420499, 355687439)
_OFFSET = 1 << 20  # what may be added to a multiple of a symbol: sequence lengths plus a little
SYMBOLS = "llm42_symbols"  # on the graph module's meta: prime → the symbolic size that it stands for


def concretise(gm: fx.GraphModule, fixed: Mapping[str, int] | None = None) -> bool:
    """Replace the symbolic sizes in all values of ``gm`` by primes.

    ``fixed``: symbols, by name, that become a number of their own; the graph is right for that number only.
    Returns False, and leaves every value as it was, when the graph has more symbols than primes, a value
    whose size does not fit into an int64 then, or a call whose result depends on data.
    """
    nodes, fixed = list(gm.graph.nodes), fixed or {}
    primes = _assign(nodes, fixed)
    if primes is None or primes.keys() <= fixed.keys():
        return False
    before = [g.value(n) for n in nodes]
    mode = FakeTensorMode()
    try:
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                node.meta[g.VALUE] = _concrete(g.value(node), primes, mode)
        for node in nodes:
            if node.op in ("call_function", "call_method"):
                g.compute_value(node, mode)
    except Exception:  # any operator may refuse: the symbolic values serve as well
        for node, v in zip(nodes, before, strict=True):
            node.meta[g.VALUE] = v
        return False
    gm.meta[SYMBOLS] = {prime: symbol for name, (prime, symbol) in primes.items() if name not in fixed}
    for node, v in zip(nodes, before, strict=True):
        if node.op == "placeholder" and isinstance(v, torch.SymInt) and str(v) in fixed:
            _substitute(node, fixed[str(v)])
    _fold_sizes(gm.graph, gm.meta[SYMBOLS])
    return True


def _fold_sizes(graph: fx.Graph, symbols: Mapping[int, Any]) -> None:
    """Calls that compute a size give way to the number, or to the input, that they always equal."""
    inputs = {g.value(n): n for n in graph.nodes if n.op == "placeholder" and _is_symbol(n, symbols)}

    def known(size: int) -> Any:
        return inputs.get(size, size if size < min(PRIMES) else None)

    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        v = g.value(node)
        meant: Any = None
        if type(v) is int:
            meant = known(v)
        elif isinstance(v, torch.Size) and None not in map(known, v):
            meant = tuple(map(known, v))
        if meant is not None:
            _substitute(node, meant)
            graph.erase_node(node)


def _is_symbol(node: fx.Node, symbols: Mapping[int, Any]) -> bool:
    return isinstance(g.value(node), int) and g.value(node) in symbols


def _substitute(node: fx.Node, meant: Any) -> None:
    """Give ``node``'s users a number, an input or a tuple of both instead."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: meant if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: meant if n is node else n)


def _assign(nodes: list[fx.Node], fixed: Mapping[str, int]) -> dict[str, tuple[int, torch.SymInt]] | None:
    """A prime, or its fixed number, for every symbolic input, by the text of its expression."""
    primes: dict[str, tuple[int, torch.SymInt]] = {}
    for node in nodes:
        v = g.value(node)
        if node.op == "placeholder" and isinstance(v, torch.SymInt) and str(v) not in primes:
            given = len(primes.keys() - fixed.keys())
            if str(v) not in fixed and given == len(PRIMES):
                return None
            primes[str(v)] = (fixed[str(v)] if str(v) in fixed else PRIMES[given], v)
    return primes


def _concrete(v: Any, primes: dict[str, tuple[int, torch.SymInt]], mode: FakeTensorMode) -> Any:
    if isinstance(v, torch.SymInt):
        return primes[str(v)][0]
    if not isinstance(v, Tensor):
        return v
    replaced = {symbol.node.expr: prime for prime, symbol in primes.values()}

    def number(size: Any) -> int:
        return int(size) if isinstance(size, int) else int(size.node.expr.xreplace(replaced))

    sizes, strides = [number(s) for s in v.shape], [number(s) for s in v.stride()]
    with mode:
        return torch.empty_strided(sizes, strides, dtype=v.dtype, device=v.device)


def symbolic(v: Any, symbols: dict[int, torch.SymInt], mode: FakeTensorMode) -> Any:
    """The value with symbolic sizes that ``v`` stands for; the inverse of what ``concretise`` did.

    Raises ValueError for a size that mixes symbols, which no known model has.
    """
    if isinstance(v, int) and not isinstance(v, bool):
        return _symbolic_size(v, symbols)
    if not isinstance(v, Tensor):
        return v
    sizes = [_symbolic_size(s, symbols) for s in v.shape]
    strides = [_symbolic_size(s, symbols) for s in v.stride()]
    with mode:
        return torch.empty_strided(sizes, strides, dtype=v.dtype, device=v.device)


def rebased(values: list[Any], symbols: dict[int, torch.SymInt]) -> dict[int, torch.SymInt]:
    """``symbols`` for a part of a graph that sees a size in multiples only: the multiple is its size.

    Inductor must find each symbol itself among the sizes of its inputs.
    """
    numbers = [v for v in values if isinstance(v, int)]
    numbers += [n for v in values if isinstance(v, Tensor) for n in (*v.shape, *v.stride())]
    factors = {
        prime: [divmod(n, prime) for n in numbers if n >= prime and n % prime < _OFFSET] for prime in symbols
    }
    found = {}
    for prime, symbol in symbols.items():
        whole = all(rest == 0 for _, rest in factors[prime])
        found[prime * (math.gcd(*(f for f, _ in factors[prime])) or 1 if whole else 1)] = symbol
    return found


def _symbolic_size(n: int, symbols: dict[int, torch.SymInt]) -> Any:
    """``a * symbol + b`` for the number that it became; numbers below all primes are themselves."""
    if n < min(symbols):
        return n
    readings = [(prime, *divmod(n, prime)) for prime in symbols if n >= prime and n % prime < _OFFSET]
    exact = [reading for reading in readings if reading[2] == 0]
    if len(exact or readings) != 1:
        raise ValueError(f"{n} is no multiple of one size plus a constant")
    prime, factor, rest = (exact or readings)[0]
    return _symbolic_size(factor, symbols) * symbols[prime] + rest


def baked(graph: fx.Graph) -> list[fx.Node]:
    """Calls with a prime, or a multiple of one, written into their arguments."""

    def is_size(arg: Any) -> bool:
        return isinstance(arg, int) and arg > 0 and any(arg % prime == 0 for prime in PRIMES)

    return [n for n in graph.nodes if any(map(is_size, torch.utils._pytree.tree_leaves((n.args, n.kwargs))))]
