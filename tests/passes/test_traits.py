"""The table of torch's functions, against torch's tags and aliasing, and against what the functions do."""

from __future__ import annotations

import operator
import re

import pytest
import torch
from torch import fx

from llm42c.codegen.operator import Tokens
from llm42c.codegen.ops import registry
from llm42c.passes import graph as g
from llm42c.passes import traits
from llm42c.passes.check import unplaced
from llm42c.passes.kinds import kind
from llm42c.passes.traits import TRAITS, Kind, functional, is_random, signature, tokens_of, traits_of

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_each_name_stands_once_and_for_all_its_spellings():
    names = [name for group in traits._TABLE.values() for name in group.split()]
    assert len(names) == len(set(names)) > 400
    aten, graph = torch.ops.aten, torch.fx.Graph()
    spellings = [torch.add, operator.add, aten.add, aten.add.Tensor, aten.add.Scalar]
    nodes = [graph.call_function(f, (1, 2)) for f in spellings] + [graph.call_method("add", (1, 2))]
    assert {g.called(node) for node in nodes} == {"add"}
    in_place = [graph.call_function(aten.add_.Tensor, (1, 2)), graph.call_method("add_", (1, 2))]
    assert {g.called(node) for node in in_place} == {"add_"}
    assert [functional(name) for name in ("add", "add_", "and_", "__and__", "llm42::linear")] == [
        *("add", "add", "and_", "__and__", "llm42::linear")
    ]
    assert {traits_of(g.called(node)) for node in nodes + in_place} == {TRAITS["add"]}


def test_operators_keep_their_namespace():
    registry.define()
    graph, ours = torch.fx.Graph(), torch.ops.llm42.rms_norm
    nodes = [graph.call_function(f, ()) for f in (ours, ours.default, torch.ops.quantized.add.default)]
    assert [g.called(node) for node in nodes] == ["llm42::rms_norm", "llm42::rms_norm", "quantized::add"]
    assert [op and op.name for op in map(g.ours, nodes)] == ["rms_norm", "rms_norm", None]
    assert [g.called(graph.placeholder("add")), g.called(None)] == ["", ""]


def _schemas(name: str) -> list[torch.FunctionSchema]:
    return torch._C._jit_get_schemas_for_operator(f"aten::{name}")


def _aliases(name: str) -> bool:
    """A result may share its argument's storage, which is not written to."""
    returned = [r.alias_info for schema in _schemas(name) for r in schema.returns]
    return any(info is not None and not info.is_write for info in returned)


def test_a_view_shares_storage():
    views = _of(Kind.VIEW) - {"_add_batch_dim", "_remove_batch_dim", "_unsafe_view"}  # it hides that it does
    assert {name for name in views if not _aliases(name)} == set()
    assert not _aliases("gather")


def test_who_writes_is_seen_by_the_name():
    """``graph.mutated_arguments`` relies on it: one underscore says that the first argument is written to."""
    # Notes about a tensor, the sort of a Python list, and an operator that nobody calls by its name.
    by_design = {"record_stream", "retain_grad", "sort", "_flash_attention_forward_no_dropout_inplace"}
    wrong, found = set(), 0
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        tensors = [a for a in schema.arguments if "Tensor" in str(a.type)]
        if not schema.name.startswith("aten::") or not tensors or any(a.is_out for a in schema.arguments):
            continue
        written = [a for a in tensors if a.alias_info is not None and a.alias_info.is_write]
        named = name.strip("_") in g._IOPS if name.endswith("__") else name.endswith("_")
        found += named
        if named != (written[:1] == tensors[:1]) and name in dir(torch) + dir(torch.Tensor):
            wrong.add(name)
    assert wrong <= by_design
    assert found > 300


def test_a_write_to_a_list_of_tensors_is_seen():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.call_function(torch._foreach_add_, ([x, y], 1))
    assert g.mutated_arguments(node) == [x, y]
    assert g.mutated_arguments(graph.call_function(torch._foreach_add, ([x, y], 1))) == []


def test_what_torch_tags_as_pointwise_divides_so_or_by_no_rule():
    overloads = {n: _tags(n) for n in ATEN}
    tagged = {name for name, tags in overloads.items() if torch.Tag.pointwise in tags}
    placed = {name for name in tagged if traits_of(name).kind in PLACED}
    assert len(placed) > 150
    assert {name for name in placed if tokens_of(name) is not Tokens.POINTWISE} == set()
    # Controls: a maximum of two tensors is tagged, and a reduction as well; torch tags a comparison of all.
    assert {"max", "equal"} <= tagged - placed


def test_who_draws_random_numbers():
    drawing = re.compile(r"drop|gumbel|rrelu|fractional|multi_head")
    functions = [n for n in dir(torch.nn.functional) if drawing.search(n) and n[0] != "_" and n[0].islower()]
    assert len(functions) > 10
    assert [name for name in functions if not is_random(name.removesuffix("_"))] == []
    assert all(
        map(is_random, ("rand", "randn_like", "bernoulli", "normal", "poisson", "multinomial", "lstm"))
    )
    assert not any(map(is_random, ("normalize", "layer_norm", "add", "sort", "no such function")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", "input dim=None keepdim=False dtype=None"),
        ("cat", "tensors dim=0"),
        ("mm", "input other"),
        ("addmm", "input mat1 mat2 beta=1 alpha=1"),
        ("norm", "input ord=fro dim=None keepdim=False dtype=None"),
        ("linalg_vector_norm", "input ord=2 dim=None keepdim=False dtype=None"),
        ("normalize", "input ord=2.0 dim=1 eps=1e-12"),
        ("dropout", "input p=0.5 training=True inplace=False"),
        ("softmax", "input dim dtype=None"),
        ("gelu", "input approximate=none"),
        ("rms_norm", "input normalized_shape weight=None eps=None"),
        ("sdpa", "query key value attn_mask=None dropout_p=0.0 is_causal=False scale=None enable_gqa=False"),
    ],
)
def test_signatures_are_torchs_own_by_one_vocabulary(name, expected):
    parts = [part.partition("=") for part in expected.split()]
    found = signature(g.FUNCTIONS[name])
    assert [key for key, _ in found] == [key for key, _, _ in parts]
    assert all(
        str(default) == (value or "None") for (_, default), (_, _, value) in zip(found, parts, strict=True)
    )


def test_every_function_that_passes_ask_for_has_a_signature():
    assert all(signature(function) for name, function in g.FUNCTIONS.items() if name != "getitem")


ATEN = sorted(
    {s.name.removeprefix("aten::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")}
)
PLACED = (Kind.VIEW, Kind.MOVE, Kind.EXACT, Kind.TRANSCENDENTAL)
# Parts of the names of operators that bring several elements together.
GATHERS = re.compile(
    r"sum|mean|norm|softmax|softmin|prod|conv|mm$|mm_|matmul|dot|pool|loss|var\b|std|trap|einsum|linear|attention|"
    r"bincount|hist|fft|rnn|gru|lstm|_add$|scatter_reduce|index_reduce|^cum|topk|sort|kthvalue|median|mode|quantile|"
    r"dist|trace|cov|corr|bag|det$|inverse|cholesky|svd|eig|solve|interp|upsample|grid_sampl|renorm|segment|bilinear"
)
# Names that only look like it.
POINTWISE = {"logaddexp", "logaddexp2", "searchsorted"}


def _of(*kinds: Kind) -> set[str]:
    return {name for name, traits in TRAITS.items() if traits.kind in kinds}


def _tags(name: str) -> set[torch.Tag]:
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    overloads = packet.overloads() if hasattr(packet, "overloads") else ()
    return {tag for overload in overloads for tag in getattr(packet, overload).tags}


def test_no_operator_that_reduces_is_placed_as_one_that_does_not():
    """By torch's tags and by name; everything in neither list, such as next year's, is unplaced."""
    assert len(ATEN) > 1000
    reducing = [name for name in ATEN if torch.Tag.reduction in _tags(name)]
    assert len(reducing) > 15
    wrong = [name for name in reducing if traits_of(name).kind in PLACED]
    wrong += [n for n in ATEN if GATHERS.search(n) and traits_of(n).kind in PLACED and n not in POINTWISE]
    assert not wrong
    allowed = {Kind.REDUCTION, Kind.EXACT_REDUCTION, Kind.TIES, Kind.UNKNOWN}
    assert {traits_of(name).kind for name in reducing} <= allowed
    exact = {n for n in ATEN if traits_of(n).kind is Kind.EXACT_REDUCTION}
    assert {functional(n) for n in exact} <= _of(Kind.EXACT_REDUCTION)


def test_what_nobody_placed_is_unplaced():
    unknown = [name for name in ATEN if traits_of(name).kind is Kind.UNKNOWN]
    assert {"gru", "upsample_bilinear2d", "native_group_norm"} <= set(unknown)
    library = torch.library.Library("llm42_test_kinds", "DEF")
    for name in ("sum", "abs", "view"):
        library.define(f"{name}(Tensor x) -> Tensor", tags=(torch.Tag.reduction,))
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["example_value"] = X
        packet = getattr(torch.ops.llm42_test_kinds, name)
        for target in (packet, packet.default):
            node = graph.call_function(target, (x,))
            node.meta["example_value"] = X
            assert kind(node) is Kind.UNKNOWN
        assert len(unplaced(graph)) == 2


POSITIVE = torch.rand(4, 6, generator=torch.Generator().manual_seed(7)) * 0.8 + 0.1
INDEX = torch.tensor([[0, 2, 1, 3, 2, 0]] * 4)
# Calls to try, with the tensor whose elements are followed in the first place.
ATTEMPTS = [
    (), (POSITIVE,), (0,), (2,), (1.5,), (0, 1), (-1, 0), (0, 0, 2), ((1, 0),), ((6, 4),), ((4, 6, 1),),
    (2, 0),
    (POSITIVE, POSITIVE), (0.1, 0.9), (POSITIVE > 0.5, 0.0), (0, INDEX), (0, INDEX[0, :4] % 4),
    (INDEX % 4, 0), (torch.float32,), ((2, 2),), (0, (4, 1)), ((4, 6), (6, 1)), (0, 2, 1),
    (0, INDEX[0, :3], POSITIVE[:3]), (0, INDEX, POSITIVE), ((INDEX[0] % 4,), 1.0), (POSITIVE > 0.5, POSITIVE),
    (POSITIVE[0], 0, 1), (0, INDEX[0, :2], 1.0),
]  # fmt: skip
AS_LIST = [
    "cat",
    "concat",
    "concatenate",
    "stack",
    "hstack",
    "vstack",
    "dstack",
    "column_stack",
    "block_diag",
]
BY_DESIGN = {"diff": 2, "glu": 2}  # a difference or a product of two elements


def _function(name):
    for space in (torch, torch.nn.functional, torch.special, torch.Tensor):
        if hasattr(space, name) and callable(getattr(space, name)):
            return getattr(space, name)
    return None


def _results(fn, name, x, args):
    out = fn([x, POSITIVE], *args) if name in AS_LIST else fn(x, *args)
    parts = list(out) if isinstance(out, (tuple, list)) else [out]
    if not parts or not all(isinstance(p, torch.Tensor) for p in parts):
        raise TypeError(name)
    return torch.cat([p.detach().double().flatten() for p in parts])


def _sources(name):
    """The most elements of its first argument that an element of a result hangs on, if it can be tried."""
    fn = _function(name)
    if fn is None:
        return None
    for args in ATTEMPTS:
        try:
            plain = _results(fn, name, POSITIVE.clone(), args).nan_to_num(7.0)
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):
            continue
        if not plain.numel() or torch.equal(plain, plain.round()):
            continue
        counts = torch.zeros(plain.numel())
        for i in range(POSITIVE.numel()):
            x = POSITIVE.clone()
            x.view(-1)[i] += 0.037
            counts += _results(fn, name, x, args).nan_to_num(7.0) != plain
        return int(counts.max())
    return None


def test_functions_that_are_placed_as_pointwise_read_one_element():
    made = {"empty", "empty_like", "new_empty"}  # of whatever was there
    names = sorted(_of(*PLACED) - made)
    found = {name: count for name in names if (count := _sources(name)) is not None}
    assert {n: c for n, c in found.items() if c > BY_DESIGN.get(n, 1)} == {}
    assert len(found) > 120  # the rest has no function of its name, or needs other arguments
    # Controls: the same count sees sums.
    assert _sources("cumsum") > 1
    assert _sources("softmax") > 1
    assert _sources("matmul") is None or _sources("matmul") > 1
