"""The engine on real Gloo ranks: bits do not depend on the mixture, and every rank has them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_world
import tiny_folder

PROMPTS = [[5, 9, 30], list(range(3, 40)), [77, 4] * 9, [2, 60]]
NEW = 36


def serve(rank: int) -> dict[str, Any]:
    """Every prompt alone, all together, and under pressure among ordinary requests."""
    import tiny
    import torch

    from llm42c.parallel import ranks
    from llm42c.runtime.loader import build_engine
    from llm42c.runtime.sampling import SamplingParams

    limits = {
        "page_size": 16, "num_pages": 24, "max_num_seqs": 4, "max_num_batched_tokens": 32,
        "fast_buckets": (1, 2, 4, 8, 16, 32), "verify_tokens": 16, "verify_seqs": 4, "verify_window": 4,
        "eos_token_ids": (), "probe_compositions": 1,
    }  # fmt: skip
    model = tiny.model("llama", torch.bfloat16)
    built = build_engine(model, ranks=ranks.world(), persist_certificates=False, **limits)
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
    woven, weaving = run_woven(limits, params, run)
    scarce = built.variant(num_pages=7)
    pressure, everything = run(scarce, [2, 0, 3, 1], True)
    return {
        "runs": [alone, together, pressure, *woven],
        "weaving": weaving,
        "everything": everything,
        "preemptions": scarce.stats().preemptions,
        "contract": built.engine.contract,
        "division": built.compiler.division.text(),
        "operators": built.compiler.compile("pinned").program.operators,
    }


def run_woven(limits: dict[str, Any], params: list[Any], run: Any) -> tuple[list[Any], dict[str, Any]]:
    """The prompts together on an engine that divides all it can, and what it did."""
    import tiny
    import torch

    from llm42c.parallel import ranks
    from llm42c.runtime.loader import build_engine

    model = tiny.model("llama", torch.bfloat16)
    options = {"token_weave": "always", "residual_shards": True, "persist_certificates": False}
    built = build_engine(model, ranks=ranks.world(), **options, **limits)
    everything = list(range(len(params)))
    runs = [run(built.engine, everything, True)[0], run(built.variant(verify="always"), everything, False)[0]]
    weaving = built.compiler.compile("pinned").weaving
    return runs, {
        "calls": weaving.program.calls,
        "plan": weaving.planner.hash,
        "summary": weaving.summary(),
        "contract": built.engine.contract,
    }


@functools.cache
def world() -> list[dict[str, Any]]:
    return rank_world.run(2, serve, timeout=300)


@pytest.mark.slow
def test_committed_bits_do_not_depend_on_the_mixture():
    results = world()
    for out in results:
        alone, *others = out["runs"]
        assert all(other == alone for other in others)
        assert out["everything"] == results[0]["everything"]  # ordinary requests too: one answer on all ranks
        assert out["contract"] == results[0]["contract"]
        assert out["preemptions"] > 0
    assert len({tuple(tokens) for tokens, _ in results[0]["runs"][0]}) > 2


@pytest.mark.slow
def test_weaving_and_shards_change_no_committed_bit():
    """The runs of the test above, where every batch of two tokens or more was woven."""
    results = world()
    for out in results:
        weaving = out["weaving"]
        assert weaving["calls"]["woven"] > 20
        assert weaving["plan"] == results[0]["weaving"]["plan"]
        assert weaving["contract"] == out["contract"]  # same contract, same bits: nothing to tell apart


@pytest.mark.slow
def test_the_graph_has_its_fused_norms_and_the_contract_its_ranks():
    for out in world():
        assert out["operators"]["llm42::all_reduce_add_rms_norm"] == 4  # two a layer
        assert "llm42::all_reduce" not in out["operators"]
        assert out["contract"].tp_size == 2
        assert out["division"].endswith("whole on every rank: lm_head (101 columns on 2 ranks)")


@pytest.mark.slow
def test_torchrun(tmp_path: Path):
    """The command line on two ranks: rank 0 alone prints."""
    model = tiny_folder.save(tmp_path / "model")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "llm42c", "generate", str(model), "w5 w9 w30", "w7 w8", "-n", "8", "--ignore-eos",
        "--json", "--token-weave", "auto",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["index"] for line in lines] == [0, 1]
    assert all(len(line["token_ids"]) == 8 for line in lines)
    assert "2 ranks; divided: " in done.stderr
    assert "token weaving: " in done.stderr
