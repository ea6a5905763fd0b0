"""Steps as CUDA graphs: every shape is recorded once and replayed on static buffers.

A graph replays addresses, so what changes from step to step goes through buffers that do not move: the
inputs of a shape lie in one block, copied to the device at once; logits of all shapes go to one buffer. A
block is overwritten whole by every step, padding included, so a replay never sees what an earlier one left.

The device does what only a GPU can (:class:`GraphDevice`); tests put another in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from llm42c.capture.packed import KVCache, PackedInputs, PackedModel
from llm42c.runtime.block_pool import as_bits
from llm42c.runtime.stats import Stats

ALIGNMENT = 256  # bytes; kernels are compiled for pointers that are multiples of 16
WARM_UPS = 2  # calls before the recording: kernels are compiled, workspaces allocated

Replay = Callable[[], None]
Shape = tuple[int, int, int, int]  # tokens, sequences, pages of a sequence, rows of logits


class GraphDevice(Protocol):
    """What a device must do for graphs. All work goes to one stream, in order."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 on the host that `upload` can read while the host goes on."""
        ...

    def device_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that does not move and that no graph's own memory overlaps."""
        ...

    def upload(self, host: Tensor, device: Tensor) -> Callable[[], None]:
        """Begin to copy; what is returned waits until `host` may be written again."""
        ...

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        """Run `call` as often as a recording needs; its last result."""
        ...

    def record(self, call: Callable[[], None]) -> Replay:
        """Record what `call` launches, without running it. Memory that it allocates is the graph's."""
        ...


class CudaGraphs:
    """Graphs of one CUDA (or ROCm) device with one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # recordings may not be made on the default stream

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def device_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def upload(self, host: Tensor, device: Tensor) -> Callable[[], None]:
        device.copy_(host, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        return copied.synchronize

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                result = call()
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        return result

    def record(self, call: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            call()
        replay: Replay = graph.replay
        return replay


class StaticInputs:
    """The inputs of one shape: a block on the host, its copy on the device, and views of both."""

    def __init__(self, example: PackedInputs, device: GraphDevice) -> None:
        self._device = device
        places, size = [], 0
        for field in fields(example):
            tensor: Tensor = getattr(example, field.name)
            places.append((size, tensor))
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._host = device.host_buffer(size)
        self._block = device.device_buffer((size,), torch.uint8)
        self._host_views = PackedInputs(*(_view(self._host, at, t) for at, t in places))
        self.inputs = PackedInputs(*(_view(self._block, at, t) for at, t in places))
        self._uploaded: Callable[[], None] | None = None

    def fill(self, inputs: PackedInputs) -> None:
        """Put a batch of this shape into the buffers; nothing of the one before is left."""
        if self._uploaded is not None:
            self._uploaded()
        views = self._host_views
        views.input_ids.copy_(inputs.input_ids)
        views.positions.copy_(inputs.positions)
        views.slot_mapping.copy_(inputs.slot_mapping)
        views.cu_seqlens_q.copy_(inputs.cu_seqlens_q)
        views.kv_lens.copy_(inputs.kv_lens)
        views.block_table.copy_(inputs.block_table)
        views.logits_indices.copy_(inputs.logits_indices)
        self._uploaded = self._device.upload(self._host, self._block)


def _view(block: Tensor, at: int, like: Tensor) -> Tensor:
    return block[at : at + math.prod(like.shape) * like.itemsize].view(like.dtype).view(like.shape)


@dataclass
class _Graph:
    static: StaticInputs
    replay: Replay
    logits: Tensor  # [rows, V]


class GraphedModel:
    """`model` on one KV cache, as graphs (a :class:`~llm42c.capture.packed.PackedModel`).

    Batches of more than `most_tokens` tokens or `most_rows` rows, and other caches, go to the model as they
    are. Logits are valid until the next `forward`.
    """

    def __init__(
        self,
        model: PackedModel,
        cache: KVCache,
        device: GraphDevice,
        stats: Stats,
        most_tokens: int,
        most_rows: int,
    ) -> None:
        self.vocab_size = model.vocab_size
        self.max_position_embeddings = model.max_position_embeddings
        self.dtype: torch.dtype = model.dtype
        self.digest = model.digest
        self.dependence = model.dependence
        self._model, self._cache, self._device, self._stats = model, cache, device, stats
        self._most_tokens, self._most_rows = most_tokens, most_rows
        self._graphs: dict[Shape, _Graph | None] = {}
        self._logits: Tensor | None = None  # [most_rows, V], of all graphs

    def new_kv_cache(self, num_pages: int, page_size: int) -> KVCache:
        return self._model.new_kv_cache(num_pages, page_size)

    def kv_bytes_per_page(self, page_size: int) -> int:
        return self._model.kv_bytes_per_page(page_size)

    def forward(self, inputs: PackedInputs, cache: KVCache) -> Tensor:
        tokens, rows = len(inputs.input_ids), len(inputs.logits_indices)
        if cache is not self._cache or tokens > self._most_tokens or rows > self._most_rows:
            self._stats.graph_misses += cache is self._cache
            return self._model.forward(inputs, cache)
        sequences, pages = inputs.block_table.shape
        shape = tokens, sequences, pages, rows
        if shape not in self._graphs:
            self._graphs[shape] = self._record(inputs)
        graph = self._graphs[shape]
        if graph is None:
            self._stats.graph_misses += 1
            return self._model.forward(inputs, cache)
        graph.static.fill(inputs)
        graph.replay()
        self._stats.graph_replays += 1
        return graph.logits

    def _record(self, inputs: PackedInputs) -> _Graph | None:
        """The graph of this shape, recorded on this batch; None if it does not repeat the calls' bits.

        Certificates speak of the calls. Running a batch again writes the same keys and values again.
        """
        static = StaticInputs(inputs, self._device)
        static.fill(inputs)

        def call() -> Tensor:
            return self._model.forward(static.inputs, self._cache)

        wanted = self._device.warm_up(call)
        if self._logits is None:
            self._logits = self._device.device_buffer((self._most_rows, wanted.shape[1]), wanted.dtype)
        out = self._logits[: len(wanted)]

        def call_into() -> None:
            out.copy_(call())

        replay = self._device.record(call_into)
        replay()
        if not torch.equal(as_bits(out), as_bits(wanted)):
            return None
        self._stats.graph_captures += 1
        return _Graph(static, replay, out)
