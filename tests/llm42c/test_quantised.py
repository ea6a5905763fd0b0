"""Models whose weights stay quantised: GGUF files as they are, in the engine and in the user's own hands."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_folder
import tiny_gguf
import torch
import transformers as hf
from tiny_gguf import MIXED, gguf

import llm42c
from llm42c import cli, quantised
from llm42c.codegen import quant
from llm42c.compile.compiler import ModelCompiler
from llm42c.errors import ModelNotFoundError, UnsupportedModelError, WeightsError
from llm42c.hub import models
from llm42c.runtime.loader import build_engine
from llm42c.runtime.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("own_models")
PROMPTS = [[7, 30, 41, 5], [9] * 20, [3, 200, 17], [100, 101, 102, 103, 104, 105]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "mixed.gguf", MIXED)


@pytest.fixture
def model(mixed: Path) -> Any:
    return models.load_model(mixed)[0]


def test_weights_are_those_of_the_file(mixed: Path, model: Any) -> None:
    assert quantised.formats(model) == {"q4_0": 6, "q4_k": 2, "q5_1": 2, "q5_k": 2, "q6_k": 2, "q8_0": 1}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
    kind, heads = gguf.GGMLQuantizationType, {"attn_q": tiny_gguf.HEADS, "attn_k": tiny_gguf.KV_HEADS}
    places = {"attn_q": "self_attn.q_proj", "attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}
    for tensor in gguf.GGUFReader(mixed).tensors:
        name = tensor.name.split(".")[-2]
        if name not in places or not tensor.name.startswith("blk.1."):
            continue
        module = model.get_submodule(f"model.layers.1.{places[name]}")
        values = quant.unpack(module.weight, module.format, module.n)
        mine = quant.dequantise(values, module.format)
        theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, kind(tensor.tensor_type)))
        if name in heads:  # rotary pairs side by side in the file, halves in the model
            theirs = theirs.view(heads[name], -1, 2, mine.shape[1]).transpose(1, 2).reshape(mine.shape)
        assert torch.equal(mine, theirs), name


def test_eager_is_close_to_the_dequantised_model(mixed: Path, model: Any) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    plain = AutoModelForCausalLM.from_pretrained(
        mixed.parent,
        gguf_file=mixed.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    ids = torch.tensor(PROMPTS[1:2])
    with torch.no_grad():
        mine, theirs = models.load_model(mixed, torch.float32)[0](ids).logits, plain(ids).logits
        assert torch.equal(model.to(torch.float32)(ids).logits, mine)
    assert mine.dtype == torch.float32
    assert (mine - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert not torch.equal(mine, theirs)


def test_one_product_takes_what_one_input_feeds(model: Any) -> None:
    compiler = ModelCompiler(model)
    graph = compiler.graph("pinned")
    calls = [n for n in graph.nodes if n.target is torch.ops.llm42.linear_q.default]
    assert Counter(n.args[2] for n in calls) == {
        "q4_k,q5_k,q6_k": 2, "q4_0": 2, "q4_0,q4_0": 2, "q5_1": 2, "q8_0": 1,
    }  # fmt: skip
    assert Counter((n.args[5] is not None, n.args[6]) for n in calls)[False, True] == 2
    report = compiler.compile("pinned").report
    assert report.unplaced == []
    assert compiler.compile("pinned").computation.machine == {}


def test_biases_are_stacked() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.Qwen2Config(vocab_size=101, num_hidden_layers=2, max_position_embeddings=96, **sizes)
    model = hf.Qwen2ForCausalLM(config).bfloat16().eval()
    for layer, kind in itertools.product(range(2), "qkv"):
        name = f"model.layers.{layer}.self_attn.{kind}_proj"
        weight = model.get_submodule(name).weight.detach().float().numpy()
        quantised.replace(model, name, "q8_0", torch.bfloat16)
        blocks = torch.from_numpy(tiny_gguf.quantised(weight, "q8_0"))
        model.get_submodule(name).weight.data = quant.pack(quant.split(blocks, "q8_0"), "q8_0")
    built = build_engine(model, kv_cache_bytes=8 << 20)
    calls = [n for n in built.compiler.graph().nodes if n.target is torch.ops.llm42.linear_q.default]
    assert [(n.args[2], n.args[4].target.count("bias")) for n in calls] == [("q8_0,q8_0,q8_0", 3)] * 2
    assert generate(built.engine, [[3, 4, 5]] * 3) == generate(built.engine, [[3, 4, 5]]) * 3
    built.close()


def generate(engine: Any, prompts: list[list[int]], **sampling: Any) -> list[tuple[list[int], list[float]]]:
    outputs = engine.generate(prompts, [SamplingParams(max_tokens=12, **sampling)] * len(prompts))
    return [(o.token_ids, o.logprobs) for o in outputs]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_a_request_has_its_bits_alone_and_among_others(mixed: Path, sampling: dict[str, Any]) -> None:
    built = build_engine(mixed, kv_cache_bytes=8 << 20)
    try:
        alone = [generate(built.engine, [p], **sampling)[0] for p in PROMPTS]
        together = generate(built.engine, PROMPTS, **sampling)
        assert together == alone
        assert generate(built.engine, PROMPTS[::-1], **sampling) == alone[::-1]
        contract = built.engine.contract
        assert contract.quantisation == quantised.formats(built.model)
        assert contract.orders["linear_q"] == "int8-groups/1"
        assert contract.machine == {}
    finally:
        built.close()
    assert len({tuple(tokens) for tokens, _ in alone}) > 1
    other = build_engine(tiny_gguf.write(mixed.with_name("other.gguf")), kv_cache_bytes=8 << 20)
    try:
        assert [generate(other.engine, [p], **sampling)[0] for p in PROMPTS] != alone
        assert other.engine.contract.quantisation == {"q4_0": 15}
    finally:
        other.close()


def test_deterministic_takes_it(model: Any) -> None:
    ids = torch.tensor(PROMPTS[:1])
    eager = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    llm42c.deterministic(model, kv_cache_bytes=8 << 20)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    twice = model.generate(ids.repeat(3, 1), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(twice, out.repeat(3, 1))
    assert out.shape == eager.shape
    llm42c.deterministic.undo(model)


def test_torch_compile_takes_it(model: Any) -> None:
    ids = torch.tensor(PROMPTS[1:2])
    with torch.no_grad():
        whole = torch.compile(model, backend="llm42")(ids, use_cache=False).logits
        assert torch.equal(whole, torch.compile(model, backend="llm42")(ids, use_cache=False).logits)
        eager = model(ids, use_cache=False).logits
    assert (whole - eager).abs().max() < 0.05 * eager.abs().max()


def test_a_tensor_that_is_not_quantised_stands_beside(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "some.gguf", {"attn_v": "f32", "ffn_up": "f32"})
    built = build_engine(file, kv_cache_bytes=8 << 20)
    try:
        assert built.engine.contract.quantisation == {"q4_0": 11}
        assert built.engine.contract.orders["linear"] == "fma-chain/2"
        together = generate(built.engine, PROMPTS)
        assert [generate(built.engine, [p])[0] for p in PROMPTS] == together
    finally:
        built.close()


def test_bad_files_are_one_line_and_leave_nothing(tmp_path: Path, mixed: Path) -> None:
    unknown = tiny_gguf.write(tmp_path / "unknown.gguf", {"attn_v": "tq1_0"})
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(mixed.read_bytes()[:-5000])
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"GGUF" + bytes(100))
    damaged = tmp_path / "damaged.gguf"
    reader = gguf.GGUFReader(mixed)
    at = next(t.data_offset for t in reader.tensors if t.name == "blk.0.attn_output.weight")
    content = bytearray(mixed.read_bytes())
    content[at : at + 2] = np.array([np.inf], dtype=np.float16).tobytes()
    damaged.write_bytes(content)
    for file, said in (
        (unknown, "blk.0.attn_v.weight: no kernel reads weights of format 'tq1_0'; there are q8_0"),
        (damaged, "blk.0.attn_output.weight: scales of q4_0 hold NaN or infinity: the file is damaged"),
        (cut, ""),
        (noise, ""),
    ):
        with pytest.raises(ModelNotFoundError, match="cannot load the model") as caught:
            models.load_model(file)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_modules_that_can_have_none(model: Any) -> None:
    with pytest.raises(WeightsError, match=r"'model\.norm' is a LlamaRMSNorm: only linears and embeddings"):
        quantised.replace(model, "model.norm", "q4_0", torch.bfloat16)
    with pytest.raises(WeightsError, match=r"'model\.nothing', which the model does not have"):
        quantised.replace(model, "model.nothing", "q4_0", torch.bfloat16)
    with pytest.raises(quant.FormatError, match="rows of 100 values are no multiple"):
        quantised.QuantisedLinear(3, 100, "q4_0", None)


def test_other_libraries_formats_stay_refused(model: Any) -> None:
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(UnsupportedModelError, match=r"quantised \(torchao\)"):
        ModelCompiler(model)


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
def test_a_model_is_quantised_and_read_back(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / format
    tiny_folder.save(source)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.Gemma3TextConfig(
        vocab_size=101,
        num_hidden_layers=2,
        max_position_embeddings=96,
        head_dim=16,
        sliding_window=16,
        **sizes,
    )
    model = hf.Gemma3ForCausalLM(config).bfloat16()  # its embedding is scaled, and tied
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)
    model.save_pretrained(source)
    assert cli.main(["quantize", str(source), "--to", format, "--out", str(out)]) == 0
    assert f"{out}: " in capsys.readouterr().out
    loaded, tokenizer = models.load_model(out)
    assert quantised.formats(loaded) == {format: 15}
    assert tokenizer("w3 w4")["input_ids"] == [3, 4]
    module = loaded.model.layers[1].mlp.up_proj
    blocks = tiny_gguf.quantised(model.model.layers[1].mlp.up_proj.weight.detach().float().numpy(), format)
    mine = quant.dequantise(quant.unpack(module.weight.data, format, module.n), format)
    assert torch.equal(mine, quant.dequantise(quant.split(torch.from_numpy(blocks), format), format))
    ids = torch.tensor([[3, 4, 50, 9, 77]])
    with torch.no_grad():
        ours, theirs = loaded(ids).logits.float(), model(ids).logits.float()
    assert (ours - theirs).abs().max() < (0.05 if format == "q8_0" else 0.6) * theirs.abs().max()
    for arguments, said in (
        ([str(source), "--to", format, "--out", str(out)], "exists"),
        ([str(source), "--to", "q2_k", "--out", str(out)], "--to must be one of q8_0"),
        ([str(out), "--to", format, "--out", str(tmp_path / "again")], "quantised already"),
    ):
        assert cli.main(["quantize", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
