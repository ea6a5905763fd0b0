"""The engine on real Gloo ranks: bits do not depend on the mixture, and every rank has them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "codegen"))
sys.path.append(str(Path(__file__).parents[1] / "llm42c"))
import rank_world
import tiny_folder

PROMPTS = [[5, 9, 30], list(range(3, 40)), [77, 4] * 9, [2, 60]]
NEW = 36


def serve(rank: int, size: int, family: str) -> dict[str, Any]:
    """Every prompt alone, all together, and under pressure among ordinary requests."""
    import tiny
    import torch

    from llm42c import ranks
    from llm42c.runtime.loader import build_engine
    from llm42c.runtime.sampling import SamplingParams

    limits = {
        "page_size": 16, "num_pages": 24, "max_num_seqs": 4, "max_num_batched_tokens": 32,
        "fast_buckets": (1, 2, 4, 8, 16, 32), "verify_tokens": 16, "verify_seqs": 4, "verify_window": 4,
        "eos_token_ids": (), "probe_compositions": 1,
    }  # fmt: skip
    place = ranks.world() if size > 1 else ranks.ALONE
    model = tiny.model(family, torch.bfloat16)
    built = build_engine(model, ranks=place, persist_certificates=False, **limits)
    params = [
        SamplingParams(max_tokens=NEW, ignore_eos=True, **({"temperature": 0.9, "seed": i} if i % 2 else {}))
        for i in range(len(PROMPTS))
    ]

    def run(engine: Any, order: list[int], ordinary: bool) -> list[Any]:
        answers: dict[str, Any] = {}
        for i in order:
            engine.submit(PROMPTS[i], params[i], request_id=str(i))
            if ordinary:
                engine.submit(PROMPTS[i], params[i], deterministic=False)
            engine.step()
        while engine.has_unfinished():
            answers |= {o.request_id: (o.token_ids, o.logprobs) for o in engine.step() if o.finished}
        return [answers[str(i)] for i in sorted(order)], answers

    alone = [run(built.variant(), [i], False)[0][0] for i in range(len(PROMPTS))]
    together, _ = run(built.variant(verify="always"), [0, 1, 2, 3], False)
    scarce = built.variant(num_pages=7)
    pressure, everything = run(scarce, [2, 0, 3, 1], True)
    return {
        "runs": [alone, together, pressure],
        "everything": everything,
        "preemptions": scarce.stats().preemptions,
        "contract": built.engine.contract,
        "division": built.compiler.division.text(),
        "operators": built.compiler.compile("pinned").program.operators,
    }


@functools.cache
def world(size: int, family: str) -> list[dict[str, Any]]:
    return rank_world.run(size, serve, size, family, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "family"), [(2, "llama"), (2, "phi3")])
def test_committed_bits_do_not_depend_on_the_mixture(size: int, family: str):
    results = world(size, family)
    for out in results:
        alone, together, pressure = out["runs"]
        assert alone == together == pressure
        assert out["everything"] == results[0]["everything"]  # ordinary requests too: one answer on all ranks
        assert out["contract"] == results[0]["contract"]
        assert out["contract"].tp_size == size
        assert out["preemptions"] > 0
    assert len({tuple(tokens) for tokens, _ in results[0]["runs"][0]}) > 2


@pytest.mark.slow
def test_the_graph_has_its_fused_norms_and_the_contract_its_ranks():
    (one,), two = world(1, "llama"), world(2, "llama")
    fused = "llm42::all_reduce_add_rms_norm"
    assert two[0]["operators"][fused] == 4  # two a layer
    assert "llm42::all_reduce" not in two[0]["operators"]
    assert fused not in one["operators"]
    assert any("tp_size: 2 -> 1" in line for line in two[0]["contract"].diff(one["contract"]))
    assert two[0]["contract"].weights == one["contract"].weights
    assert two[0]["division"].endswith("whole on every rank: lm_head (101 columns on 2 ranks)")


@pytest.mark.slow
def test_torchrun(tmp_path: Path):
    """The command line on two ranks: one answer, printed once, equal for one prompt and for two."""
    model = tiny_folder.save(tmp_path / "model")
    texts = []
    for prompts in (["w5 w9 w30"], ["w5 w9 w30", "w7 w8"]):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "llm42c", "generate", *prompts, "--model", str(model), "-n", "8", "--ignore-eos", "--json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == len(prompts)
        texts.append((lines[0]["token_ids"], lines[0]["logprobs"], lines[0]["contract"]))
    assert texts[0] == texts[1]
