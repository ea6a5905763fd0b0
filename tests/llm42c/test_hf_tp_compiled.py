"""A model that Hugging Face divided, compiled with ``backend="llm42"``, on two real ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import tp_families
import transformers as hf
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "codegen"))
import rank_world


def work(rank: int, folder: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits: eager, compiled, and compiled with the first row alone."""
    from transformers.distributed import DistributedConfig

    if rank == 0:
        tp_families.model("llama", torch.float32).save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_size=2)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
    ids = torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        eager = model.eval()(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="llm42", fullgraph=True, dynamic=False)
        return eager, compiled(ids, use_cache=False).logits, compiled(ids[:1], use_cache=False).logits


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch(tmp_path: Path):
    pytest.importorskip("transformers.distributed")
    results = rank_world.run(2, work, str(tmp_path), timeout=200)
    for eager, together, alone in results:
        assert torch.equal(together[:1], alone)
        assert torch.equal(together, results[0][1])
        # Some 300 operations of fp32 a logit, on values about 1.
        assert float((eager - together).abs().max()) < 1e-4
        assert float(eager.abs().max()) > 0.01
