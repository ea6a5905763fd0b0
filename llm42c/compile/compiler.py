"""From a Hugging Face decoder to callables on packed batches: capture once, compile each form of it.

``pinned`` runs the packed pipeline, so that every reduction has one order; ``stock`` leaves linears and
norms to Inductor and MKL as they come (only attention, which must read the paged cache, is ours). Both
come from one capture, and pinned forms share one copy of the packed weights.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from llm42c import versions
from llm42c.capture.dynamo import KVSpec, new_kv_cache
from llm42c.capture.packed import KVCache, PackedInputs
from llm42c.capture.support import context_limit
from llm42c.codegen import targets
from llm42c.compile import inductor
from llm42c.compile.added_passes import find_passes
from llm42c.compile.computation import Computation, computation_of
from llm42c.compile.dump import Dump
from llm42c.compile.identity import Identity
from llm42c.compile.piecewise import PiecewiseProgram, compile_piecewise
from llm42c.compile.rewriter import Rewriter
from llm42c.compile.row_independence import dependence
from llm42c.compile.standin import StandIn
from llm42c.compile.stored import Rewritten
from llm42c.compile.weights import WeightStore
from llm42c.device import CPU, device_of_model, dtype_of_model, load_operators, target_of
from llm42c.digest import checked_digest, graph_digest
from llm42c.errors import ConfigError
from llm42c.options import Options, TokenWeave
from llm42c.parallel.ranks import ALONE, Ranks
from llm42c.parallel.tensor_parallel import divide
from llm42c.passes.base import PACKED, STOCK, Pass, Report

if TYPE_CHECKING:
    from llm42c.weave.option import PackedWeaving

Form = Literal["pinned", "stock"]
_FLAT_FIELDS = ("slot_mapping", "cu_seqlens_q", "kv_lens", "block_table", "logits_indices")


@dataclass
class CompiledModel:
    """One compiled form of a model (a :class:`~llm42c.capture.packed.PackedModel`).

    ``weaving`` is what ``token_weave`` made of it, None where that is off. ``dependence``: see PackedModel.
    """

    form: Form
    vocab_size: int
    max_position_embeddings: int
    dtype: torch.dtype
    digest: str  # of the graph as it runs, and its form
    computation: Computation
    program: PiecewiseProgram
    report: Report
    dependence: str | None
    _inputs: list[str]
    _kv_spec: list[KVSpec]
    weaving: PackedWeaving | None = None
    device: torch.device = CPU
    _last: tuple[KVCache, list[Any]] | None = None  # the cache of the last call, and its arguments

    def new_kv_cache(self, num_pages: int, page_size: int) -> KVCache:
        return new_kv_cache(self._kv_spec, num_pages, page_size, self.dtype, self.device)

    def kv_bytes_per_page(self, page_size: int) -> int:
        elements = sum(2 * s.num_kv_heads * s.head_dim for s in self._kv_spec)
        return elements * page_size * self.dtype.itemsize

    def forward(self, inputs: PackedInputs, cache: KVCache) -> Tensor:
        """Write K/V of every non-padding row; return logits [R, V] in the model's dtype.

        Inputs are brought to the model's device; there, all layers share the work list of one step.
        """
        with targets.of(self.device).step():
            return self._forward(inputs.to(self.device), cache)

    def _forward(self, inputs: PackedInputs, cache: KVCache) -> Tensor:
        args = self._template(cache)
        for i, name in enumerate(self._inputs):
            if name == "input_ids" or name == "positions":
                args[i] = getattr(inputs, name).unsqueeze(0)
            elif name in _FLAT_FIELDS:
                args[i] = getattr(inputs, name)
            elif name == "sym:T":
                args[i] = inputs.input_ids.shape[0]
            elif name == "sym:R":
                args[i] = inputs.logits_indices.shape[0]
        with torch.no_grad():
            (logits,) = self.program(*args) if self.weaving is None else self.weaving.run(*args)
        result: Tensor = logits.squeeze(0)
        return result

    def _template(self, cache: KVCache) -> list[Any]:
        """The argument list with this cache's tensors in place."""
        if self._last is None or self._last[0] is not cache:
            tensors = {f"k_cache.{i}": t for i, t in enumerate(cache.k)}
            tensors |= {f"v_cache.{i}": t for i, t in enumerate(cache.v)}
            self._last = (cache, [tensors.get(name) for name in self._inputs])
        return self._last[1].copy()


class ModelCompiler:
    """Captures ``model`` once and compiles forms of it on request.

    ``keep_originals=True`` leaves the model's own parameters in memory beside the packed ones.
    ``token_weave`` and ``residual_shards`` are those of :class:`~llm42c.options.Options`, for the pinned form
    of a divided model; they change no bit. ``passes`` are its passes, which run on the kinds of graph that
    each names; what they do is in the graph's digest. With ``ranks`` the model is divided in place;
    ``digest`` is that of the whole weights, and ranks whose weights or graphs are not the same are named in a
    RanksDifferError. It computes where the model lies. Raises OptionsError (``passes``),
    UnsupportedModelError, DeviceError, WeightsError (NaN or infinity), BuildError (no C++ compiler), or
    StaleError for a stand-in that is not of the model as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep_originals: bool = False,
        strict: bool = True,
        ranks: Ranks = ALONE,
        token_weave: TokenWeave = "off",
        residual_shards: bool = False,
        passes: Sequence[str | Pass] = (),
    ) -> None:
        versions.notice()
        self.passes = find_passes(passes)
        self.token_weave: TokenWeave = token_weave
        self.residual_shards = residual_shards
        self.model = model
        self.ranks = ranks
        self.device = device_of_model(model)
        target = target_of(self.device)
        self.digest = checked_digest(model)
        if isinstance(model, StandIn):
            model.require(self.digest)
        ranks.require_same("the weights", self.digest)
        self.division = divide(model, ranks)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # g++ works while Dynamo traces
            kernels = pool.submit(target.prepare)
            self._rewriter = Rewriter(
                model,
                self.passes,
                strict=strict,
                residual_shards=residual_shards,
                stored=ranks.size == 1 and token_weave == "off",
            )
            kernels.result()
        load_operators(self.device)
        ranks.meet("the captured model")
        self.weights = WeightStore(model, keep_originals=keep_originals)
        self._compiled: dict[Form, CompiledModel] = {}
        self._graphs: dict[Form, fx.GraphModule] = {}

    def compile(self, form: Form = "pinned", *, release: bool = False) -> CompiledModel:
        """The compiled form; asking twice gives the same object. Raises ConfigError for an unknown one.

        With ``release`` every parameter that neither it nor a form compiled before reads is freed as soon as
        it is packed, so that the model never lies in memory twice; an error gives them all back.
        """
        if form not in get_args(Form):
            raise ConfigError(f"fast must be one of {', '.join(get_args(Form))}, not {form!r}")
        if form not in self._compiled:
            try:
                self._compiled[form] = self._compile(form, release)
            except BaseException:
                self.weights.restore()
                raise
        return self._compiled[form]

    def graph(self, form: Form = "pinned") -> fx.Graph:
        """The graph that the compiled form runs, after all passes."""
        self.compile(form)
        return self._graphs[form].graph

    def release_originals(self) -> int:
        """Free the parameters that no compiled form reads; returns the bytes freed."""
        return self.weights.release(*self._graphs.values())

    def restore(self) -> None:
        """Give the model its parameters back exactly."""
        self.weights.restore()

    @property
    def identity(self) -> Identity | None:
        """What its stored graphs are kept under; None where nothing is stored."""
        return self._rewriter.identity

    @property
    def kv_spec(self) -> list[KVSpec]:
        """Keys and values of each attention call."""
        return self._rewriter.kv_spec

    def _weaving(self, gm: fx.GraphModule, whole: PiecewiseProgram) -> PackedWeaving:
        from llm42c.weave.option import weave_packed  # sympy and networkx, for those who ask

        with self.ranks.watch("the weaving plan"):
            return weave_packed(gm, self.token_weave, whole)

    def _computation(self, rewritten: Rewritten, target: str, program: PiecewiseProgram) -> Computation:
        """Of the graph without residual shards, which divide the same arithmetic and change no bit."""
        if self.residual_shards and target == PACKED:
            rewritten = self._rewriter.rewrite(target, residual_shards=False)
            self.weights.materialise(rewritten.gm)
        return computation_of(rewritten.gm, rewritten.weights, bool(program.clusters), self.device)

    def _dependence(
        self, rewritten: Rewritten, form: Form, program: PiecewiseProgram, computation: Computation
    ) -> str | None:
        if form == "stock" or self.ranks.size > 1:
            return "Inductor chooses its orders" if form == "stock" else "several ranks compute it"
        if program.clusters and inductor.missing():
            return f"Inductor of this torch does not know {', '.join(inductor.missing())}"
        if program.clusters and computation.foreign and inductor.without_compiler(self.device):
            return f"without a C++ compiler PyTorch computes {', '.join(computation.foreign)}"
        return dependence(rewritten.gm, rewritten.inputs, targets.of(self.device).name)

    def _compile(self, form: Form, release: bool) -> CompiledModel:
        if form == "stock":
            self.weights.restore()  # it reads the originals, which a packed form may have released
        config = self.model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
        target = PACKED if form == "pinned" else STOCK
        dump = Dump.for_options(Options(), target)
        rewritten = self._rewriter.rewritten(target, dump)
        gm = rewritten.gm
        self.ranks.require_same(f"the {form} graph", graph_digest(gm, rewritten.weights))
        self.weights.materialise(gm, (*self._graphs.values(), gm) if release else ())
        with dump.generated_code():
            program = compile_piecewise(gm, "fixed" if form == "pinned" else "free")
        dump.write("program.py", program.source)
        weaving = self._weaving(gm, program) if form == "pinned" and self.token_weave != "off" else None
        computation = self._computation(rewritten, target, program)
        self._graphs[form] = gm
        return CompiledModel(
            form=form,
            vocab_size=config.vocab_size,
            max_position_embeddings=context_limit(self.model),
            dtype=dtype_of_model(self.model),
            digest=f"{computation.graph}-{form}",
            computation=computation,
            program=program,
            report=rewritten.report,
            dependence=self._dependence(rewritten, form, program, computation),
            _inputs=rewritten.inputs,
            _kv_spec=rewritten.kv_spec,
            weaving=weaving,
            device=self.device,
        )
