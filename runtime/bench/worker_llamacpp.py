"""llama.cpp behind a pipe. Run by another interpreter, in which llm42 is not installed:

    python worker_llamacpp.py MODEL.gguf [--threads 2]

Speaks as worker_vllm.py does. Its C interface is called directly: prompts are prefilled in batches of at most
512 tokens, then every step decodes one token of each sequence in one batch; greedy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

BATCH = 512  # tokens of a batch
SEQUENCES = 32
CONTEXT = SEQUENCES * 640  # tokens, of all sequences together


class Batched:
    """A model and one context of it for up to 32 sequences."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp as lib

        self._lib = lib
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, BATCH, BATCH, SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = lib.llama_init_from_model(self._model, params)
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """`new_tokens` for each prompt, end-of-sequence ignored."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        out: list[list[int]] = [[] for _ in prompts]
        items = [(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)]
        for at in range(0, len(items), BATCH):
            part = items[at : at + BATCH]
            self._decode(part)
            for row, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    out[sequence].append(self._argmax(row))
        for _ in range(new_tokens - 1):
            ends = zip(prompts, out, strict=True)
            self._decode([(o[-1], len(p) + len(o) - 1, s, True) for s, (p, o) in enumerate(ends)])
            for sequence, tokens in enumerate(out):
                tokens.append(self._argmax(sequence))
        return out

    def _decode(self, items: list[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if self._lib.llama_decode(self._context, batch):
            sys.exit("llama.cpp found no room for a batch")

    def _argmax(self, row: int) -> int:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # stdout is ours alone: the engine's prints are sent to stderr
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    start = time.perf_counter()
    import llama_cpp

    engine = Batched(args.model, args.threads)
    answer(start_s=time.perf_counter() - start, version=llama_cpp.__version__)
    for line in sys.stdin:
        work = json.loads(line)
        start = time.perf_counter()
        tokens = engine.generate(work["prompts"], work["new_tokens"])
        answer(seconds=time.perf_counter() - start, tokens=tokens)


if __name__ == "__main__":
    main()
