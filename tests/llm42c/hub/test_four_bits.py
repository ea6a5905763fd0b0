"""Four-bit checkpoints of Hugging Face: their integers, scales and zeros as they are, whatever the layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_folder
import torch
import transformers as hf
from torch import Tensor

from llm42c import quantised
from llm42c.codegen import quant
from llm42c.errors import ModelNotFoundError
from llm42c.hub import four_bits, models
from llm42c.runtime.loader import build_engine
from llm42c.runtime.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("own_models")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(q: Tensor) -> Tensor:
    """[a, 8 b] → [a, b] int32, the first in the lowest nibble."""
    shifted = q.long().unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int32)


def gptq(q: Tensor, scale: Tensor, zero: Tensor, symmetric: bool) -> dict[str, Tensor]:
    group = q.shape[1] // scale.shape[1]
    return {
        "qweight": words(q).T, "qzeros": words(zero.T - 1), "scales": scale.T,
        "g_idx": (torch.arange(q.shape[1]) // group).int(),
    }  # fmt: skip


def awq(q: Tensor, scale: Tensor, zero: Tensor, symmetric: bool) -> dict[str, Tensor]:
    def columns(x: Tensor) -> Tensor:  # [N, m] → [m, N / 8]
        return words(x.T.unflatten(1, (-1, 8))[..., ORDER].flatten(1))

    return {"qweight": columns(q), "qzeros": columns(zero), "scales": scale.T}


def compressed(q: Tensor, scale: Tensor, zero: Tensor, symmetric: bool) -> dict[str, Tensor]:
    found = {"weight_packed": words(q), "weight_scale": scale, "weight_shape": torch.tensor(q.shape)}
    return found if symmetric else found | {"weight_zero_point": words(zero.T).T}


def _compressed_config(group: int | None) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


METHODS: dict[str, tuple[Callable[..., dict[str, Tensor]], Callable[[int | None], dict[str, Any]]]] = {
    "gptq": (gptq, lambda g: {"quant_method": "gptq", "bits": 4, "group_size": g, "desc_act": False}),
    "awq": (awq, lambda g: {"quant_method": "awq", "bits": 4, "group_size": g, "version": "gemm"}),
    "compressed-tensors": (compressed, _compressed_config),
}


def save(
    folder: Path, method: str, group: int = 64, symmetric: bool = False, **settings: Any
) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint in ``folder``, and its weights by name, in fp64."""
    torch.manual_seed(0)
    tiny_folder.save(folder)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=101, num_hidden_layers=2, max_position_embeddings=96, **SIZES)
    )
    model = model.bfloat16()
    pack, config = METHODS[method]
    dtype = torch.bfloat16 if method == "compressed-tensors" else torch.float16
    state, exact = {}, {}
    linears = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}
    for name, tensor in model.state_dict().items():
        owner = name.removesuffix(".weight")
        if owner not in linears:
            state[name] = tensor
            continue
        n, k = tensor.shape
        q = torch.randint(0, 16, (n, k))
        scale = (torch.rand(n, k // group) / 100 + 0.001).to(dtype)
        zero = torch.full((n, k // group), 8) if symmetric else torch.randint(1, 16, (n, k // group))
        exact[owner] = scale.double().repeat_interleave(group, 1) * (q - zero.repeat_interleave(group, 1))
        parts = pack(q, scale, zero, symmetric)
        state |= {f"{owner}.{leaf}": part.contiguous() for leaf, part in parts.items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads(model.config.to_json_string())
    values |= {
        "quantization_config": config(group) | settings,
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder, exact


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_the_file(method: str, symmetric: bool, tmp_path: Path) -> None:
    folder, exact = save(tmp_path, method, symmetric=symmetric)
    model, tokenizer = models.load_model(folder)
    assert quantised.formats(model) == {"i4_64": 14}
    assert tokenizer("w3 w4")["input_ids"] == [3, 4]
    for name, weight in exact.items():
        module = model.get_submodule(name)
        values = quant.unpack(module.weight.data, module.format, module.n)
        assert torch.equal(quant.dequantise(values, module.format).double(), weight), name
    assert len({float(w.sum()) for w in exact.values()}) == 14


def test_the_engine_runs_it(tmp_path: Path) -> None:
    folder, _ = save(tmp_path, "compressed-tensors", group=128)
    built = build_engine(folder, kv_cache_bytes=8 << 20)
    prompts, sampling = [[5, 6, 7], [9] * 12, [3, 4]], SamplingParams(max_tokens=8)

    def run(asked: list[list[int]]) -> list[Any]:
        return [(o.token_ids, o.logprobs) for o in built.engine.generate(asked, [sampling] * len(asked))]

    try:
        assert built.engine.contract.quantisation == {"i4_128": 14}
        assert run(prompts) == [run([p])[0] for p in prompts]
    finally:
        built.close()


@pytest.mark.parametrize(("group", "format"), [(32, "i4_32"), (128, "i4_128"), (96, "i4_32")])
def test_groups_become_those_that_kernels_read(group: int, format: str) -> None:
    q = torch.randint(0, 16, (3, 384))
    scale, zero = torch.rand(3, 384 // group).half(), torch.randint(0, 16, (3, 384 // group))
    made, name = four_bits.blocks("w", four_bits.FourBits(q.byte(), scale, zero))
    assert name == format
    wide = scale.float().repeat_interleave(group, 1) * (q - zero.repeat_interleave(group, 1))
    assert torch.equal(quant.dequantise(quant.split(made, name), name), wide)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("gptq", {"bits": 8}, "gptq weights with 8 bits"),
        ("awq", {"version": "gemv"}, "awq weights with the layout 'gemv'"),
        ("compressed-tensors", {"format": "float-quantized"}, "the format 'float-quantized'"),
    ],
)
def test_other_kinds_are_refused(method: str, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder, _ = save(tmp_path, method, **settings)
    with pytest.raises(ModelNotFoundError) as caught:
        models.load_model(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    folder, _ = save(tmp_path, "gptq")
    file, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj"
    state = safetensors.torch.load_file(file)
    for change, said in (
        ({f"{name}.g_idx": torch.arange(128).flip(0).int() // 64}, "order of activations"),
        ({f"{name}.scales": state[f"{name}.scales"][:, :-8].contiguous()}, "do not fit a weight (256, 128)"),
        ({f"{name}.scales": state[f"{name}.scales"] * torch.nan}, "hold NaN or infinity"),
        ({f"{name}.qweight": None}, "and no qweight"),
        ({"model.norm.weight": None}, "the file lacks model.norm.weight"),
        ({"model.norm.weight": torch.ones(3)}, "the shape of model.norm.weight does not fit"),
    ):
        changed = {k: v for k, v in (state | change).items() if v is not None}
        safetensors.torch.save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ModelNotFoundError) as caught:
            models.load_model(folder)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    assert quantised.formats(models.load_model(folder)[0]) == {"i4_64": 14}
