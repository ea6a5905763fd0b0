"""Large primes in place of symbolic sizes, for the time of a pipeline.

Computing with symbolic shapes costs about a millisecond a call; a decoder of 30 layers has thousands of
calls. So the packed pipeline gives each symbol (T, R) a prime larger than any constant of a model and
runs on ordinary numbers. Nothing is lost where every size of the graph is ``a * T + b`` for one of the
symbols, whole numbers a and b, and b small (or ``T`` times such a size): such a size can be read from
its value at the primes, so two sizes that are equal there are equal for every T and R. :func:`concretise`
reads every size of the graph back and compares; a graph with any other size (``T // 2``, ``T % 64``,
``T + R``) keeps its symbols, and the report says why.

Nothing may write a size into an argument as a number; :func:`baked` finds such a fault.
"""

from __future__ import annotations

import itertools
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
assert min(PRIMES) > g.STAND_INS
_OFFSET = 1 << 20  # less than this may be added to a multiple of a symbol, or taken away
_CONSTANTS = min(PRIMES) - _OFFSET  # numbers below are the same for every size
SYMBOLS = "llm42_symbols"  # on the graph module's meta: prime → the symbolic size that it stands for
NO_SYMBOLS = "no size of the graph is symbolic"


def concretise(gm: fx.GraphModule, fixed: Mapping[str, int] | None = None) -> str | None:
    """Replace the symbolic sizes in all values of ``gm`` by primes.

    ``fixed``: symbols, by name, that become a number of their own; the graph is right for that number only.
    Returns None, or why every value was left as it was: the graph has more symbols than primes or none, a
    size that cannot be read back, a value whose size does not fit into an int64, or a call whose result
    depends on data.
    """
    nodes, fixed = list(gm.graph.nodes), fixed or {}
    primes = _assign(nodes, fixed)
    if not primes.keys() - fixed.keys():
        return NO_SYMBOLS
    if len(primes.keys() - fixed.keys()) > len(PRIMES):
        return f"{len(primes.keys() - fixed.keys())} symbolic sizes, of which {len(PRIMES)} can be followed"
    before = [g.value(n) for n in nodes]
    if (why := _unreadable(nodes, primes, fixed)) is not None:
        return why
    mode, node = FakeTensorMode(), nodes[0]
    try:
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                node.meta[g.VALUE] = _concrete(g.value(node), primes, mode)
        for node in nodes:
            if node.op in ("call_function", "call_method"):
                g.compute_value(node, mode)
    except Exception as error:  # any operator may refuse: the symbolic values serve as well
        for n, v in zip(nodes, before, strict=True):
            n.meta[g.VALUE] = v
        return f"{node.name} has no value at large sizes ({type(error).__name__})"
    gm.meta[SYMBOLS] = {prime: symbol for name, (prime, symbol) in primes.items() if name not in fixed}
    for node, v in zip(nodes, before, strict=True):
        if node.op == "placeholder" and isinstance(v, torch.SymInt) and str(v) in fixed:
            _substitute(node, fixed[str(v)])
    _fold_sizes(gm.graph, gm.meta[SYMBOLS])
    return None


def _sizes(v: Any) -> list[Any]:
    """The sizes and strides that a value is made of."""
    if isinstance(v, Tensor):
        return [*v.shape, *v.stride(), v.storage_offset()]
    if isinstance(v, (tuple, list)):
        return [size for part in v for size in _sizes(part)]
    return [v] if isinstance(v, torch.SymInt) else []


def _unreadable(
    nodes: list[fx.Node], primes: dict[str, tuple[int, torch.SymInt]], fixed: Mapping[str, int]
) -> str | None:
    """A size of the graph that its value at the primes does not tell."""
    import sympy  # type: ignore[import-untyped]  # half a second, which graphs without symbols need not spend

    symbols: dict[int, Any] = {prime: s.node.expr for name, (prime, s) in primes.items() if name not in fixed}
    numbers = {s.node.expr: sympy.Integer(prime) for prime, s in primes.values()}
    constants = {s.node.expr: numbers[s.node.expr] for name, (_, s) in primes.items() if name in fixed}
    known: set[Any] = set()
    for node in nodes:
        for expr in (size.node.expr for size in _sizes(g.value(node)) if isinstance(size, torch.SymInt)):
            if expr not in known and not _reads_back(expr.xreplace(constants), numbers, symbols):
                return f"{node.name} has the size {expr}, which is no multiple of one size plus a constant"
            known.add(expr)
    return None


def _reads_back(expr: Any, numbers: Mapping[Any, Any], symbols: dict[int, Any]) -> bool:
    """``expr``, as a number at the primes, says that it is ``expr``."""
    import sympy

    value = expr.xreplace(numbers)
    if not value.is_Integer:
        return False
    try:
        return bool(sympy.expand(_symbolic_size(int(value), symbols) - expr) == 0)
    except ValueError:
        return False


def _fold_sizes(graph: fx.Graph, symbols: Mapping[int, Any]) -> None:
    """Calls that compute a size give way to the number, or to the input, that they always equal."""
    inputs = {g.value(n): n for n in graph.nodes if n.op == "placeholder" and _is_symbol(n, symbols)}

    def known(size: int) -> Any:
        return inputs.get(size, size if size < _CONSTANTS else None)

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


def _assign(nodes: list[fx.Node], fixed: Mapping[str, int]) -> dict[str, tuple[int, torch.SymInt]]:
    """A prime, or its fixed number, for every symbolic input, by the text of its expression."""
    symbols = [v for n in nodes if n.op == "placeholder" and isinstance(v := g.value(n), torch.SymInt)]
    given = itertools.chain(PRIMES, itertools.repeat(0))
    primes: dict[str, tuple[int, torch.SymInt]] = {}
    for v in symbols:
        if str(v) not in primes:
            primes[str(v)] = (fixed[str(v)] if str(v) in fixed else next(given), v)
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


def symbolic(v: Any, symbols: Mapping[int, torch.SymInt], mode: FakeTensorMode) -> Any:
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


def rebased(values: list[Any], symbols: Mapping[int, torch.SymInt]) -> dict[int, torch.SymInt]:
    """``symbols`` for a part of a graph that sees a size in multiples only: the multiple is its size.

    Inductor must find each symbol itself among the sizes of its inputs.
    """
    numbers = [v for v in values if isinstance(v, int)]
    numbers += [n for v in values if isinstance(v, Tensor) for n in (*v.shape, *v.stride())]
    found = {}
    for prime, symbol in symbols.items():
        readings = [r for n in numbers if (r := _reading(n, prime)) is not None]
        whole = all(rest == 0 for _, rest in readings)
        found[prime * (math.gcd(*(f for f, _ in readings)) or 1 if whole else 1)] = symbol
    return found


def _reading(n: int, prime: int) -> tuple[int, int] | None:
    """(factor, rest) when ``n`` is a multiple of ``prime`` and a little more or less."""
    factor, rest = divmod(n, prime)
    if rest > prime - _OFFSET:
        factor, rest = factor + 1, rest - prime
    return (factor, rest) if factor > 0 and abs(rest) < _OFFSET else None


def _symbolic_size(n: int, symbols: Mapping[int, Any]) -> Any:
    """``a * symbol + b`` for the number that it became; numbers below all primes are themselves."""
    if n < min(symbols) - _OFFSET:
        return n
    readings = [(prime, *r) for prime in symbols if (r := _reading(n, prime)) is not None]
    exact = [reading for reading in readings if reading[2] == 0][:1]  # T · R has two, and they say the same
    if len(exact or readings) != 1:
        raise ValueError(f"{n} is no multiple of one size plus a constant")
    prime, factor, rest = (exact or readings)[0]
    return _symbolic_size(factor, symbols) * symbols[prime] + rest


def _is_size(arg: Any) -> bool:
    """A number that only a size can be: a small multiple of a prime, or of a product of two, and a little."""
    if isinstance(arg, slice):
        return any(map(_is_size, (arg.start, arg.stop, arg.step)))
    if isinstance(arg, bool) or not (isinstance(arg, int) or (isinstance(arg, float) and arg.is_integer())):
        return False
    readings = [r for prime in PRIMES if (r := _reading(abs(int(arg)), prime)) is not None]
    return any(factor < _OFFSET or _is_size(factor) for factor, _ in readings)


def baked(graph: fx.Graph) -> list[fx.Node]:
    """Calls with a size written into their arguments: T, 2 T + 3, T * T, as a number or in a slice."""
    leaves = torch.utils._pytree.tree_leaves
    return [n for n in graph.nodes if any(map(_is_size, leaves((n.args, n.kwargs))))]
