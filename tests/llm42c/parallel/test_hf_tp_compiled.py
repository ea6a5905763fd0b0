"""A model that Hugging Face divided, compiled with ``backend="llm42"``, on two real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_world
import torch
import torch.distributed as dist
import tp_families
import transformers as hf
from torch import Tensor, fx

from llm42c.passes.weave import communication as comm


def work(rank: int, folder: str) -> dict[str, Any]:
    """Logits: eager; compiled, of two rows and of the first; of the rewritten graph, plain and woven."""
    from transformers.distributed import DistributedConfig

    if rank == 0:
        tp_families.model("llama", torch.float32).save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_size=2)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        eager = model.eval()(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="llm42", fullgraph=True, dynamic=False)
        together, alone = (compiled(rows, use_cache=False).logits for rows in (ids, ids[:1]))
        found = without_inductor(model, ids)
    return {"eager": eager, "together": together, "alone": alone, **found}


def without_inductor(model: Any, ids: Tensor) -> dict[str, Any]:
    """The graph that the backend makes of the model, its calls as they stand: woven, then not."""
    from llm42c import backend
    from llm42c.compile.dump import Dump
    from llm42c.options import Options
    from llm42c.weave import option as weave_option

    options, made = Options.parse({"token_weave": "always"}), []
    build = weave_option.compile_woven

    def kept(*args: Any, **kwargs: Any) -> Any:
        made.append(build(*args, **kwargs))
        return made[-1]

    def rewritten(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        backend.rewrite_plain(gm, inputs, options, Dump(None, ""))
        return weave_option.weave_or_leave(gm, inputs, options, "eager", backend.inductor.compile_fixed)

    weave_option.compile_woven = kept  # this process is a test's own
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(ids, 1)
    run = torch.compile(model, backend=rewritten, fullgraph=True)
    woven = run(ids, use_cache=False).logits
    made[0].when = "off"
    plain = run(ids, use_cache=False).logits
    planner, calls = made[0].planner, made[0].calls
    split = planner.split
    collectives = sum(comm.is_collective(n) for n in split.original.graph.nodes)
    found = {"plan": planner.hash, "calls": calls, "split": split.collectives, "collectives": collectives}
    return {"woven": woven, "plain": plain, **found}


@pytest.mark.slow
def test_rows_depend_neither_on_their_batch_nor_on_weaving(tmp_path: Path):
    pytest.importorskip("transformers.distributed")
    results = rank_world.run(2, work, str(tmp_path), timeout=200)
    for out in results:
        assert torch.equal(out["together"][:1], out["alone"])
        assert torch.equal(out["together"], results[0]["together"])
        assert torch.equal(out["woven"], out["plain"])
        assert out["plan"] == results[0]["plan"]  # though each rank holds other rows of the embedding
        assert out["calls"] == {"woven": 1, "whole": 1}
        assert out["split"] == out["collectives"] >= 3
        # Some 300 operations of fp32 a logit, on values about 1.
        assert float((out["eager"] - out["together"]).abs().max()) < 1e-4
        assert float(out["eager"].abs().max()) > 0.01
