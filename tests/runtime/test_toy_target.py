"""CONTRIBUTING's recipe for a target, followed from outside: a folder of two files, and nothing else.

It computes by the simulators, on tensors of the CPU, in processes that never load the C++ kernels.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

FILES = {
    "simulated/target.py": '''
        """A target whose kernels are the simulators of the CPU's orders."""

        from pathlib import Path

        from llm42c.codegen import simulate
        from llm42c.codegen.device import MEASURED, Device, Value
        from llm42c.codegen.implementation import digest_of
        from llm42c.codegen.packing import Packing
        from llm42c.codegen.targets import Target


        class Transposed(Packing):
            def linear_pack(self, weight):
                """→ [K, N]"""
                return weight.new_empty(weight.shape[1], weight.shape[0])

            def quantised(self, values, format):
                return super().quantised(values, format).flip(0)

            def quantised_values(self, packed, format, n):
                return super().quantised_values(packed.flip(0), format, n)


        class Simulated(Target):
            name, device_type, dispatch_key = "simulated", "cpu", "CPU"
            packing = Transposed()

            def order(self, op):
                return op.orders["cpu"]

            def launcher(self, op):
                return super().launcher(op) or (None if op.traffic else op.simulators.get(self.order(op)))

            def where(self, op):
                found = self.launcher(op)
                return found and found.__module__

            def sources(self):
                own = Path(__file__).parent.glob("*.py")
                return {"simulators": digest_of([*own, Path(simulate.__file__)])}

            def identity(self, device, foreign, threads):
                assert not foreign, "what is no operator would be torch's"
                return {}

            def detect(self, index=0):
                return Device("abacus", "ten beads", "wood", {"cores": Value(1.0, "by hand")})

            def rates(self):
                return {"memory_bandwidth": Value(17.0, f"{MEASURED}: by the clock")}

            def rates_now(self):
                return {"fp32_flops": Value(5.0, f"{MEASURED}: by the clock")}


        TARGET = Simulated()
    ''',
    "simulated/products.py": '''
        """What has a layout of its own to read."""

        from llm42c.codegen import simulate
        from llm42c.codegen.operator import implements


        @implements("linear_pack", "simulated")
        def linear_pack(weight):
            return weight.t().contiguous()


        @implements("linear_unpack", "simulated")
        def linear_unpack(packed, n, k):
            return packed.t().contiguous()


        @implements("linear", "simulated")
        def linear(x, packed, bias, n):
            return simulate.linear(x, packed.t(), bias)


        @implements("linear_silu_mul", "simulated")
        def linear_silu_mul(x, packed, n):
            return simulate.silu_mul(linear(x, packed, None, 2 * n))


        @implements("linear_add", "simulated")
        def linear_add(x, packed, bias, residual, n):
            return residual + linear(x, packed, bias, n)
    ''',
}
PROGRAM = """
    import json, sys
    import torch, transformers

    from llm42c.codegen import simulate, targets
    from llm42c.codegen.cpu import build

    kind, folder = sys.argv[1:]
    if kind != "cpu":
        sys.path.insert(0, folder)
        from simulated.target import TARGET
        targets.add(TARGET)
        build.build = build.load_library = None  # whoever calls them fails
    if kind == "backwards":
        ascending = simulate.linear
        simulate.linear = lambda x, w, bias: ascending(x.flip(-1), w.flip(-1), bias)

    import llm42c
    from llm42c.runtime.loader import build_engine
    from llm42c.runtime.sampling import SamplingParams

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=101, max_position_embeddings=96,
    )).eval()
    names = list(model.state_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(12)[None] * 7 % 101
    with torch.no_grad():
        logits = torch.compile(model, backend="llm42")(ids, use_cache=False).logits
    built = build_engine(
        model, page_size=16, num_pages=24, max_num_seqs=4, max_num_batched_tokens=16, verify_tokens=8,
        verify_seqs=4, fast_buckets=(4, 8, 16), persist_certificates=False,
    )
    params = SamplingParams(max_tokens=5, temperature=0.8, seed=3, ignore_eos=True)
    outputs = built.engine.generate([[3, 1, 4], [1, 5, 9, 2, 6, 5, 3]], params, deterministic=True)
    contract = built.engine.contract
    built.close()

    from llm42c.codegen import quant
    from llm42c.quantised import QuantisedLinear
    from llm42c.weave.captured import measured
    device = measured(None, torch.device("cpu"))
    product = QuantisedLinear(40, 64, "q8_0", None)
    scales = torch.linspace(0.5, 2.0, 80).to(torch.float16).view(40, 2, 1)
    integers = (torch.arange(40 * 64).view(40, 2, 32) * 37 % 251 - 125).to(torch.int8)
    blocks = torch.cat([scales.view(torch.uint8), integers.view(torch.uint8)], -1)
    product.weight.data = blocks.flatten(1)
    product.pack()
    x = torch.linspace(-1, 1, 128).view(2, 64)
    print(json.dumps({
        "quantised": product(x).view(torch.int32).flatten().tolist(),
        "packed": product.weight.data[:, 0, 40].tolist(),
        "device": [device.kind, *(device.get(name) for name in ("memory_bandwidth", "fp32_flops"))],
        "logits": logits.view(torch.int32).flatten().tolist(),
        "tokens": [o.token_ids for o in outputs],
        "logprobs": [[x.hex() for x in o.logprobs] for o in outputs],
        "target": contract.target, "orders": contract.orders, "machine": contract.machine,
        "implementation": sorted(contract.implementation), "hash": contract.hash,
        "restored": all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()),
        "library": build.loaded_library() is not None,
    }))
"""
BITS = ("logits", "tokens", "logprobs", "quantised")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same model on the C++ kernels, on the toy target, and on one whose chains begin at the end."""
    folder = tmp_path_factory.mktemp("target")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    found = {}
    for kind in ("cpu", "simulated", "backwards"):
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), kind, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_folder_is_a_target(results: dict[str, dict[str, Any]]) -> None:
    """``torch.compile`` and the engine run on it, its contract says so, and its bits are its orders'."""
    cpu, toy = results["cpu"], results["simulated"]
    assert toy["target"] == "simulated"
    assert toy["implementation"] == ["rules", "simulators"]
    assert toy["machine"] == {}
    assert toy["orders"] == cpu["orders"]
    assert toy["hash"] != cpu["hash"]
    assert toy["restored"]
    assert cpu["library"]
    assert not toy["library"]
    assert {name: toy[name] for name in BITS} == {name: cpu[name] for name in BITS}


def test_its_rates_and_its_quantised_weights_are_its_own(
    results: dict[str, dict[str, Any]],
) -> None:
    """What a plan costs there is computed with its numbers, and nobody else looks into its weights."""
    cpu, toy = results["cpu"], results["simulated"]
    assert toy["device"] == ["abacus", 17.0, 5.0]
    assert cpu["device"][0] == "cpu"
    assert cpu["device"][1] > 1e6
    assert toy["packed"] == cpu["packed"][::-1] != cpu["packed"]


def test_another_order_on_it_has_other_bits(results: dict[str, dict[str, Any]]) -> None:
    """Control, and guard: the model shows what its target computes."""
    assert results["backwards"]["logits"] != results["simulated"]["logits"]
    assert results["backwards"]["logprobs"] != results["simulated"]["logprobs"]
