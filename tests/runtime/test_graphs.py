"""Steps as graphs: one recording a shape, static buffers, and nothing of one step in the next.

A graph here is the call itself, run again on the static buffers; copies and replays wait in a queue, as on a
stream.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from toy import VOCAB, NoisyModel, ToyModel, ToySampler, make_engine, small_config, toy_decode

from llm42c.capture.packed import KVCache, PackedInputs
from llm42c.compile.compiler import ModelCompiler
from llm42c.errors import ConfigError
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.engine import Engine
from llm42c.runtime.graphs import ALIGNMENT, WARM_UPS, CudaGraphs, GraphedModel, StaticInputs
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.stats import Stats


class FakeGraphs:
    """A stream that runs at once, or while ``lazy`` when somebody waits for it; memory begins as garbage."""

    def __init__(self) -> None:
        self.lazy = False
        self.recorded = 0
        self._queue: list[Callable[[], Any]] = []

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0x55, dtype=torch.uint8)

    def device_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, 77, dtype=dtype)

    def upload(self, host: Tensor, device: Tensor) -> Callable[[], None]:
        self._launch(lambda: device.copy_(host))
        return self.synchronize

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        call()
        return call()

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return lambda: self._launch(call)

    def _launch(self, work: Callable[[], Any]) -> None:
        self._queue.append(work)
        if not self.lazy:
            self.synchronize()

    def synchronize(self) -> None:
        while self._queue:
            self._queue.pop(0)()


class CarelessGraphs(FakeGraphs):
    """Says that a copy is done when it has only begun."""

    def upload(self, host: Tensor, device: Tensor) -> Callable[[], None]:
        super().upload(host, device)
        return lambda: None


def _engine(fast: ToyModel, config: EngineConfig, graphs: FakeGraphs | None) -> Engine:
    verifier = ToyModel(fixed=(config.verify_tokens, config.verify_seqs, config.rows))
    return Engine(fast, verifier, config, sampler=ToySampler(), decode=toy_decode, graphs=graphs)


def _serve(engine: Engine) -> dict[str, RequestOutput]:
    """Prompts longer than a chunk, decodes, ordinary requests and few pages, arriving over time."""
    done = {}
    for i in range(14):
        prompt = [(7 * i + 3 * j) % 40 for j in range(1 + (5 * i) % 31)]
        hot = {"temperature": 1.1, "top_k": 9, "seed": i} if i % 3 == 0 else {}
        params = SamplingParams(max_tokens=6 + i, ignore_eos=True, repetition_penalty=1.0 + i % 2, **hot)
        engine.submit(prompt, params, deterministic=i % 4 != 1, request_id=str(i))
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
    return done


def _answers(done: dict[str, RequestOutput]) -> dict[str, tuple[list[int], list[float]]]:
    """Of deterministic requests, and of ordinary ones without chance."""
    return {i: (o.token_ids, o.logprobs) for i, o in done.items() if int(i) % 4 != 1 or int(i) % 3}


def test_an_engine_answers_the_same_with_graphs() -> None:
    config = small_config(num_pages=30)
    plain = _serve(_engine(ToyModel(), config, None))
    graphs = FakeGraphs()
    engine = _engine(ToyModel(), config, graphs)
    done = _serve(engine)
    assert len(done) == 14
    assert _answers(done) == _answers(plain)
    stats = engine.stats()
    assert stats.graph_captures == graphs.recorded
    assert stats.graph_replays == stats.fast_steps + stats.verifier_steps
    assert stats.graph_misses == 0
    assert 3 < graphs.recorded < stats.graph_replays / 2


def test_a_compiled_model_takes_static_buffers() -> None:
    """The real operators on views of one block: the same bits as on the packer's own arrays."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=VOCAB)).eval()
    config = small_config(max_model_len=96, page_size=16)
    compiled = ModelCompiler(model).compile("pinned")
    plain = Engine(compiled, compiled, config, decode=toy_decode)
    graphed = Engine(compiled, compiled, config, decode=toy_decode, graphs=(graphs := FakeGraphs()))
    assert _answers(_serve(graphed)) == _answers(_serve(plain))
    assert graphs.recorded == graphed.stats().graph_captures > 3
    assert graphed.stats().graph_misses == 0


def test_each_shape_is_recorded_once() -> None:
    graphs = FakeGraphs()
    engine = _engine(ToyModel(), small_config(), graphs)
    _serve(engine)
    before = graphs.recorded
    shapes = len(engine.config.shapes()) + 1  # and the verifier's
    assert before <= shapes
    _serve(engine)
    assert graphs.recorded <= shapes


def test_larger_steps_run_without_a_graph() -> None:
    config = small_config(cuda_graph_tokens=6)
    engine = _engine(ToyModel(), config, FakeGraphs())
    done = _serve(engine)
    assert _answers(done) == _answers(_serve(_engine(ToyModel(), small_config(), None)))
    stats = engine.stats()
    assert stats.graph_misses > 3
    assert stats.graph_replays > 3
    assert stats.graph_misses + stats.graph_replays == stats.fast_steps + stats.verifier_steps


def test_a_limit_below_every_shape_means_no_graph() -> None:
    config = small_config(cuda_graph_tokens=2, fast_buckets=(4, 24))
    engine = _engine(ToyModel(), config, graphs := FakeGraphs())
    _serve(engine)
    assert graphs.recorded == 0
    assert engine.stats().graph_misses > 0


def test_a_shape_that_does_not_repeat_its_bits_gets_no_graph() -> None:
    """Certificates speak of calls, so a graph with other bits than the calls may not stand in for them."""
    engine = _engine(NoisyModel(flip=0.1), small_config(), graphs := FakeGraphs())
    done = _serve(engine)
    stats = engine.stats()
    assert stats.graph_captures == 1, "only the verifier repeats itself"
    assert graphs.recorded > 1
    assert stats.graph_misses == stats.fast_steps
    want = _serve(make_engine(config=small_config(verify="always")))
    for i in done:
        if int(i) % 4 != 1:
            assert (done[i].token_ids, done[i].logprobs) == (want[i].token_ids, want[i].logprobs)


@dataclass
class Witness(ToyModel):
    """Logits are the input ids; remembers what it was shown."""

    seen: list[dict[str, list[Any]]] = field(default_factory=list)
    places: set[int] = field(default_factory=set)

    def forward(self, inputs: PackedInputs, cache: KVCache) -> Tensor:
        self.places.add(inputs.input_ids.data_ptr())
        names = ("input_ids", "slot_mapping", "kv_lens", "cu_seqlens_q", "logits_indices")
        self.seen.append({name: getattr(inputs, name).tolist() for name in names})
        return inputs.input_ids[inputs.logits_indices].float()[:, None].repeat(1, 4)


def _batch(ids: list[int], padding: int = 0) -> PackedInputs:
    n = len(ids)
    zeros = [0] * padding
    return PackedInputs(
        input_ids=torch.tensor([*ids, *zeros]),
        positions=torch.tensor([*range(n), *zeros]),
        slot_mapping=torch.tensor([*range(n), *(-1 for _ in zeros)]),
        cu_seqlens_q=torch.tensor([0, n], dtype=torch.int32),
        kv_lens=torch.tensor([n], dtype=torch.int32),
        block_table=torch.tensor([[0, 1, 2]], dtype=torch.int32),
        logits_indices=torch.tensor([n - 1, 0]),
    )


def _graphed(device: FakeGraphs, model: ToyModel | None = None) -> tuple[Witness, KVCache, GraphedModel]:
    model = model or Witness()
    cache = model.new_kv_cache(2, 4)
    assert isinstance(model, Witness)
    return model, cache, GraphedModel(model, cache, device, Stats(), 16, 2)


def test_nothing_of_a_larger_batch_is_left_in_the_padding_of_the_next() -> None:
    model, cache, graphed = _graphed(FakeGraphs())
    graphed.forward(_batch([5, 6, 7, 8]), cache)
    got = graphed.forward(_batch([9, 10], padding=2), cache)
    last = model.seen[-1]
    assert last["input_ids"] == [9, 10, 0, 0]
    assert last["slot_mapping"] == [0, 1, -1, -1]
    assert last["kv_lens"] == [2]
    assert last["cu_seqlens_q"] == [0, 2]
    assert got[:, 0].tolist() == [10.0, 9.0]
    assert len(model.places) == 1, "the recorded call must see the static buffers only"


def test_a_block_that_is_not_overwritten_whole_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the padding, slots of the batch before are written again."""
    whole = StaticInputs.fill

    def partly(self: StaticInputs, inputs: PackedInputs) -> None:
        whole(self, inputs)
        real = int(inputs.cu_seqlens_q[-1])
        self.inputs.slot_mapping[real:] = torch.arange(real, len(inputs.input_ids))

    monkeypatch.setattr(StaticInputs, "fill", partly)
    model, cache, graphed = _graphed(FakeGraphs())
    graphed.forward(_batch([5, 6, 7, 8]), cache)
    graphed.forward(_batch([9, 10], padding=2), cache)
    assert model.seen[-1]["slot_mapping"] != [0, 1, -1, -1]
    with pytest.raises(AssertionError):
        _serve(_engine(ToyModel(), small_config(), FakeGraphs()))


@pytest.mark.parametrize("device", [FakeGraphs, CarelessGraphs])
def test_the_host_block_is_not_written_while_it_is_copied(device: type[FakeGraphs]) -> None:
    """Steps follow each other before the device has begun; the careless device is the negative control."""
    model, cache, graphed = _graphed(graphs := device())
    graphed.forward(_batch([1, 2]), cache)
    model.seen.clear()
    graphs.lazy = True
    for ids in ([3, 4], [5, 6], [7, 8]):
        graphed.forward(_batch(ids), cache)
    graphs.synchronize()
    seen = [shown["input_ids"] for shown in model.seen]
    assert (seen == [[3, 4], [5, 6], [7, 8]]) == (device is FakeGraphs), seen


def test_other_caches_go_to_the_model_itself() -> None:
    model, cache, graphed = _graphed(graphs := FakeGraphs())
    other = graphed.new_kv_cache(2, 4)
    graphed.forward(_batch([1, 2]), other)
    assert (graphs.recorded, len(model.seen)) == (0, 1)
    graphed.forward(_batch([1, 2]), cache)
    assert graphs.recorded == 1
    assert graphed.kv_bytes_per_page(4) == model.kv_bytes_per_page(4)


def test_logits_of_all_shapes_share_one_buffer() -> None:
    """Graphs keep no outputs alive, so that their memory can be the same memory."""
    _, cache, graphed = _graphed(FakeGraphs())
    a = graphed.forward(_batch([1, 2]), cache)
    b = graphed.forward(_batch([1, 2, 3]), cache)
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_static_inputs_are_aligned_and_alike() -> None:
    batch = _batch([1, 2, 3], padding=2)
    static = StaticInputs(batch, FakeGraphs())
    base = static.inputs.input_ids.untyped_storage().data_ptr()
    for name, want in vars(batch).items():
        got = getattr(static.inputs, name)
        assert (got.data_ptr() - base) % ALIGNMENT == 0
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    static.fill(batch)
    for name, want in vars(batch).items():
        assert torch.equal(getattr(static.inputs, name), want)


class _FakeStream:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_stream(self, other: object) -> None:
        self.log.append("wait")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda as far as CudaGraphs calls it, on the CPU; every call must fit torch's own signature."""
    log: list[str] = []
    real = inspect.signature(torch.cuda.graph.__init__)

    @contextlib.contextmanager
    def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
        real.bind(None, *args, **kwargs)
        log.append("begin")
        yield
        log.append("end")

    @contextlib.contextmanager
    def stream(stream: Any) -> Iterator[None]:
        log.append("side")
        yield

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    class Event:
        def record(self, stream: Any) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("uploaded")

    fakes = {
        "graph": graph,
        "stream": stream,
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": lambda device: _FakeStream(log),
        "current_stream": lambda device: _FakeStream(log),
        "synchronize": lambda device: log.append("synchronize"),
        "graph_pool_handle": lambda: (0, 1),
    }
    for name, fake in fakes.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(
        CudaGraphs, "host_buffer", lambda self, nbytes: torch.zeros(nbytes, dtype=torch.uint8)
    )
    return log


def test_cuda_graphs_warm_up_aside_then_record_then_replay(cuda: list[str]) -> None:
    graphs = CudaGraphs(torch.device("cpu"))
    model = Witness()
    cache = model.new_kv_cache(2, 4)
    graphed = GraphedModel(model, cache, graphs, Stats(), 16, 2)
    graphed.forward(_batch([1, 2]), cache)
    first = ["record", "wait", "side", "wait", "synchronize", "begin", "end", "replay"]
    assert cuda == [*first, "uploaded", "record", "replay"]
    assert len(model.seen) == WARM_UPS + 1, "calls to warm up, and the recorded one"
    cuda.clear()
    graphed.forward(_batch([3, 4]), cache)
    assert cuda == ["uploaded", "record", "replay"]
    assert len(model.seen) == WARM_UPS + 1


def test_options() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs"):
        small_config(cuda_graphs="always")
    with pytest.raises(ConfigError, match="cuda_graph_tokens"):
        small_config(cuda_graph_tokens=0)
