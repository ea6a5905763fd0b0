"""Packed weights of one model: built once from recipes, shared by all its graphs, undone exactly.

A packed weight replaces its originals in memory. The originals come back bit for bit, because packing
only permutes elements: :meth:`WeightStore.restore` undoes the release, and while it lasts
``model.state_dict()`` (and so ``save_pretrained``) still returns the original tensors.

A released parameter keeps its shape: one NaN in memory, seen through strides of 0. Reading it gives NaN,
writing to its elements is an error of torch, and one value for all of them (``zero_``) is kept by
:meth:`WeightStore.restore`: nothing is lost in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from llm42c.codegen.ops import roots, trigonometry
from llm42c.device import device_of_inputs
from llm42c.errors import WeightsError
from llm42c.memory import forget, trim
from llm42c.passes import graph as g
from llm42c.passes.recipes import PackedWeight, Part, PositionTable, Recipe, recipes

_ORDERED = {**trigonometry.ORDERED, "sqrt": roots.sqrt, "rsqrt": roots.rsqrt}
_TRIM = 1 << 20  # bytes freed that are worth a walk through the C library's memory


@dataclass(frozen=True)
class _Place:
    """Where a released parameter lives: rows ``start:start + rows`` of a packed weight [total, k]."""

    label: str
    start: int
    rows: int
    total: int
    k: int
    transposed: bool


class WeightStore:
    """The packed weights of ``model``. Graphs captured from the same model share them by name.

    ``keep_originals=True`` never frees the model's own parameters.
    """

    def __init__(self, model: nn.Module, *, keep_originals: bool = False) -> None:
        self._model = model
        self._keep = keep_originals
        self._packed: dict[str, Tensor] = {}
        self._places: dict[int, _Place] = {}  # by id of the released Parameter
        self._released: dict[int, nn.Parameter] = {}
        self._hook: Any = None

    def materialise(self, gm: fx.GraphModule, readers: Sequence[fx.GraphModule] = ()) -> None:
        """Build every packed constant that ``gm`` uses and set it as its attribute.

        A packed weight that another graph already built is shared. With ``readers``, all graphs that will
        run, each original that none of them reads is freed as soon as its packed weight stands: a model in
        memory and its packed weights exist side by side for one weight at a time. Without, call this for
        all graphs before :meth:`release`.
        """
        # Tables first: what they are computed from must not have been freed.
        wanted = dict(sorted(recipes(gm.graph).items(), key=lambda item: not _is_table(item[1])))
        uses = Counter(part.attribute for recipe in wanted.values() for part in _parts(recipe))
        read = None if self._keep or not readers else _read((*readers, gm))
        for label, recipe in wanted.items():
            if label not in self._packed:
                self._packed[label] = self._build(gm, label, recipe)
            setattr(gm, label, self._packed[label])
            uses.subtract(part.attribute for part in _parts(recipe))
            if read is not None:
                last = [getattr(gm, p.attribute) for p in _parts(recipe) if not uses[p.attribute]]
                if sum(self._release(p) for p in last if self._may_release(p, read)) > _TRIM:
                    trim()
        _drop_unused(gm)

    def release(self, *graphs: fx.GraphModule) -> int:
        """Free the originals that no graph in ``graphs`` reads any more; returns the bytes freed."""
        if self._keep:
            return 0
        read = _read(graphs)
        return sum(self._release(p) for p in self._model.parameters() if self._may_release(p, read))

    def _may_release(self, parameter: Tensor, read: set[int]) -> bool:
        key = id(parameter)
        packed = isinstance(parameter, nn.Parameter) and key in self._places
        return packed and key not in read and key not in self._released

    def _release(self, parameter: nn.Parameter) -> int:
        """Free the memory of a parameter that lies in a packed weight; returns the bytes."""
        if self._hook is None:
            # A plain function: torch sets an attribute on the hook.
            def hook(module: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
                self._fill_state_dict(module, state, prefix)

            self._hook = self._model.register_state_dict_post_hook(hook)
        freed = parameter.untyped_storage().nbytes()
        self._released[id(parameter)] = parameter
        whole = parameter.data
        parameter.data = whole.new_full((1,), torch.nan).expand(whole.shape)
        forget(whole)  # what lies in a mapped file stays there as long as any weight of that file
        return freed

    def is_released(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._released

    def value(self, parameter: nn.Parameter) -> Tensor:
        """What ``parameter`` holds, whether it is released or not; not to be written to."""
        return self._value(parameter) if self.is_released(parameter) else parameter.detach()

    def restore(self) -> None:
        """Give the model its parameters back, bit for bit, but for those that somebody has overwritten."""
        for parameter in self._released.values():
            parameter.data = self._value(parameter)
        self._released.clear()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights."""
        return sum(t.untyped_storage().nbytes() for t in self._packed.values())

    def _build(self, gm: fx.GraphModule, label: str, recipe: Recipe) -> Tensor:
        with torch.no_grad():
            if isinstance(recipe, PositionTable):
                return _tabulate(gm, recipe)
            sources = [self._source(gm, p) for p in recipe.parts]
            rows = [_rows(source, p) for source, p in zip(sources, recipe.parts, strict=True)]
            stacked = rows[0].detach()
            if len(rows) > 1:
                stacked = torch.cat(rows)
                for source in sources:
                    forget(source)
            if not isinstance(recipe, PackedWeight):
                return stacked
            start, total, k = 0, stacked.shape[0], stacked.shape[1]
            for part, piece in zip(recipe.parts, rows, strict=True):
                n = piece.shape[0]
                place = _Place(label, start, n, total, k, part.transposed)
                self._places.setdefault(id(getattr(gm, part.attribute)), place)
                start += n
            packed: Tensor = torch.ops.llm42.linear_pack(stacked.contiguous())
            return packed

    def _source(self, gm: fx.GraphModule, part: Part) -> Tensor:
        tensor = getattr(gm, part.attribute)
        if id(tensor) in self._released:
            return self._value(tensor)
        if not isinstance(tensor, Tensor):
            raise WeightsError(f"{part.attribute} is no tensor")
        return tensor

    def _value(self, parameter: Tensor) -> Tensor:
        """What a released parameter holds: its original, unless it was overwritten meanwhile."""
        data = parameter.data
        if data.untyped_storage().nbytes() > data.itemsize or not data.isnan().all():
            return data.contiguous()
        return self._original(self._places[id(parameter)])

    def _original(self, place: _Place) -> Tensor:
        whole = torch.ops.llm42.linear_unpack(self._packed[place.label], place.total, place.k)
        rows = whole[place.start : place.start + place.rows]
        return (rows.t() if place.transposed else rows).clone(memory_format=torch.contiguous_format)

    def _fill_state_dict(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Put the originals where ``state_dict`` found released parameters."""
        names = {
            name: p for name, p in module.named_parameters(remove_duplicate=False) if id(p) in self._released
        }
        made: dict[int, Tensor] = {}  # tied parameters stay tied
        for name, parameter in names.items():
            if prefix + name in state:
                key = id(parameter)
                made.setdefault(key, self._value(parameter))
                state[prefix + name] = made[key]


def _tabulate(gm: fx.GraphModule, recipe: PositionTable) -> Tensor:
    read = [getattr(gm, str(n.target)) for n in recipe.graph.nodes if n.op == "get_attr"]
    positions = torch.arange(recipe.limit, device=device_of_inputs(read))
    table: Tensor = _Ordered(fx.GraphModule(gm, recipe.graph)).run(positions.unsqueeze(0))
    return table.contiguous()


class _Ordered(fx.Interpreter):
    """Runs a graph with the cosines, sines and roots that are the same on every machine."""

    def run_node(self, n: fx.Node) -> Any:
        name = g.name(n) if n.op in ("call_function", "call_method") else ""
        if name in _ORDERED and len(n.args) == 1 and not n.kwargs:
            (x,) = self.fetch_args_kwargs_from_env(n)[0]
            if isinstance(x, Tensor):
                return _ORDERED[name](x)
        return super().run_node(n)


def _read(graphs: Sequence[fx.GraphModule]) -> set[int]:
    """Ids of the tensors that the graphs read."""
    return {id(getattr(gm, str(n.target))) for gm in graphs for n in gm.graph.nodes if n.op == "get_attr"}


def _parts(recipe: Recipe) -> tuple[Part, ...]:
    return () if isinstance(recipe, PositionTable) else recipe.parts


def _is_table(recipe: Recipe) -> bool:
    return isinstance(recipe, PositionTable)


def _rows(tensor: Tensor, part: Part) -> Tensor:
    return tensor.t() if part.transposed else tensor


def _drop_unused(gm: fx.GraphModule) -> None:
    """Forget the module attributes that the graph does not read, so that nothing holds their memory."""
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in (*gm.named_parameters(), *gm.named_buffers()) if n not in read]:
        delattr(gm, name)
