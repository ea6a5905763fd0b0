"""Products in the order of AMX, for those who ask for it: a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from llm42c.codegen.ops import registry
from llm42c.passes.base import PACKED, Context, PassReport
from llm42c.passes.two_chains import two_chains
from llm42c.runtime.engine import Engine
from llm42c.runtime.loader import BuiltEngine, build_engine
from llm42c.runtime.sampling import SamplingParams

LIMITS: dict[str, Any] = {
    "num_pages": 40, "max_num_seqs": 4, "max_num_batched_tokens": 32, "persist_certificates": False,
}  # fmt: skip
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [7, 8, 9], list(range(2, 60)))
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, seed=5)


def tiny() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=101, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).bfloat16().eval()


@pytest.fixture(scope="module")
def built() -> BuiltEngine:
    """By its own name."""
    return build_engine(tiny(), passes=["two_chains"], **LIMITS)


def say(engine: Engine, prompts: Any) -> list[tuple[list[int], list[float]]]:
    ids = [engine.submit(p, PARAMS, stream=False) for p in prompts]
    done = {}
    while engine.has_unfinished():
        done |= {o.request_id: (o.token_ids, o.logprobs) for o in engine.step() if o.finished}
    return [done[i] for i in ids]


def test_every_product_has_the_order_and_the_contract_says_so(built: BuiltEngine) -> None:
    orders = built.engine.contract.orders
    assert {name for name in orders if name.startswith("linear")} == {
        "linear_blocks", "linear_silu_mul_blocks"
    }  # fmt: skip
    assert orders["linear_blocks"] == "two-chains32/1"


def test_requests_do_not_see_each_other_and_the_bits_are_others(built: BuiltEngine) -> None:
    alone = [say(built.variant(), [p])[0] for p in PROMPTS]
    assert say(built.engine, PROMPTS) == alone
    plain = build_engine(tiny(), **LIMITS)
    assert plain.engine.contract.hash != built.engine.contract.hash
    assert say(plain.engine, PROMPTS) != alone, "these log-probs do not show the order"


def test_products_of_other_dtypes_keep_their_order() -> None:
    registry.define()
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    with FakeTensorMode():
        x.meta["example_value"], w.meta["example_value"] = torch.empty(1, 3, 32), torch.empty(2, 32, 48)
    y = graph.call_function(torch.ops.llm42.linear.default, (x, w, None, 96))
    graph.output(y)
    report = PassReport("two_chains")
    two_chains(graph, Context(PACKED), report)
    assert (len(report.matches), [e.reason for e in report.misses]) == (0, ["of torch.float32"])
