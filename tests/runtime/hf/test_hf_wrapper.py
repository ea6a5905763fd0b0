"""The wrapper itself: the model stays the model, and undoing it leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from tiny_models import ENGINE, VOCAB, bits, make, padded, plain, prompt, wrapped
from transformers import GenerationMixin, LlamaForCausalLM

import llm42c
from llm42c.errors import ConfigError, OptionsError, RequestError

INPUTS = padded([prompt(5, 1), prompt(9, 2)])
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _hooks(model: torch.nn.Module) -> list[Any]:
    kinds = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_forward_hooks")
    return [dict(getattr(m, kind)) for m in model.modules() for kind in kinds]


def _is_packed(model: Any) -> bool:
    weight = model.lm_head.weight
    return bool(weight.untyped_storage().nbytes() < weight.numel() * weight.itemsize)


def _new(**options: Any) -> Any:
    return llm42c.deterministic(make("llama", tie_word_embeddings=False), **ENGINE, **options)


def test_the_model_stays_itself_and_undo_leaves_no_trace() -> None:
    model: Any = make("llama")
    attributes, state, hooks, config = (
        dict(model.__dict__),
        _state(model),
        _hooks(model),
        model.config.to_dict(),
    )
    storage = {n: p.untyped_storage().nbytes() for n, p in model.named_parameters()}
    assert llm42c.deterministic(model, **ENGINE) is model
    assert isinstance(model, LlamaForCausalLM)
    assert type(model) is LlamaForCausalLM
    ours = model.generate(**INPUTS, **GREEDY)
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < sum(storage.values()) / 2
    assert _equal(_state(model), state)
    assert model.num_parameters() == make("llama").num_parameters()
    assert _is_packed(model)
    assert model.llm42.contract.hash[:16] in repr(model.llm42)
    assert llm42c.deterministic.undo(model) is model
    assert model.__dict__.keys() == attributes.keys()
    assert all(model.__dict__[k] is v for k, v in attributes.items() if k != "_modules")
    assert _hooks(model) == hooks
    assert model.config.to_dict() == config
    assert {n: p.untyped_storage().nbytes() for n, p in model.named_parameters()} == storage
    assert _equal(dict(model.named_parameters()), dict(make("llama").named_parameters()))
    assert torch.equal(model.generate(**INPUTS, **GREEDY), ours)
    with pytest.raises(ValueError, match="is not deterministic"):
        llm42c.deterministic.undo(model)
    with pytest.raises(ValueError, match="is not deterministic"), llm42c.deterministic.off(model):
        pass


def test_save_pretrained_round_trip(tmp_path: Any) -> None:
    wrapped().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert _equal(_state(loaded), _state(plain()))
    assert loaded.config.architectures == ["LlamaForCausalLM"]


def test_pickling_and_copying_are_refused_in_one_line() -> None:
    for attempt in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match="use save_pretrained") as caught:
            attempt(wrapped())
        assert "\n" not in str(caught.value)


def test_off_is_the_ordinary_model() -> None:
    model = _new()
    ours = model.generate(**INPUTS, **GREEDY)
    with llm42c.deterministic.off(model) as same:
        assert same is model
        assert "generate" not in model.__dict__
        assert not hasattr(model, "llm42")
        assert torch.equal(model.generate(**INPUTS, **GREEDY), ours)
        assert model(**INPUTS).logits.shape == (2, 9, VOCAB)
    assert "generate" in model.__dict__
    assert torch.equal(model.generate(**INPUTS, **GREEDY), ours)
    assert model.llm42.compilations == 1
    assert _is_packed(model)  # again


def test_a_forward_pass_gets_its_weights() -> None:
    model, expected = _new(), make("llama", tie_word_embeddings=False)(**INPUTS).logits
    assert _is_packed(model)
    assert torch.equal(model(**INPUTS).logits, expected)
    assert torch.equal(model.lm_head.weight, make("llama", tie_word_embeddings=False).lm_head.weight)
    before = model.generate(**INPUTS, **GREEDY)
    for part in (model.lm_head, model.model.layers[1].mlp.up_proj):
        model.llm42.release()
        assert _is_packed(model)
        assert part(torch.ones(1, 64)).shape == (1, part.out_features)
        assert not _is_packed(model)
    model.llm42.release()
    assert torch.equal(model.generate(**INPUTS, **GREEDY), before)
    assert model.llm42.compilations == 1


def test_keep_weights() -> None:
    model = _new(keep_weights=True)
    model.generate(**INPUTS, **GREEDY)
    assert not _is_packed(model)


def test_weights_that_change_are_noticed() -> None:
    """In-place updates, new tensors, load_state_dict and to: the next generate uses what is there."""
    other = make("llama", seed=1, tie_word_embeddings=False)
    expected = other.generate(**INPUTS, **GREEDY)
    model = _new(keep_weights=True)
    assert not torch.equal(model.generate(**INPUTS, **GREEDY), expected)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    assert torch.equal(model.generate(**INPUTS, **GREEDY), expected)
    assert model.llm42.compilations == 2

    model = _new()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.generate(**INPUTS, **GREEDY), expected)

    model = _new()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()
    assert torch.equal(model.generate(**INPUTS, **GREEDY), expected)

    contract = model.llm42.contract
    assert model.to(torch.bfloat16) is model
    assert model.dtype == torch.bfloat16
    assert _equal(_state(model), _state(other.to(torch.bfloat16)))
    model.generate(**INPUTS, **GREEDY)
    assert model.llm42.contract.dtype != contract.dtype


def test_one_compilation_for_fifty_calls() -> None:
    """No graph is captured and nothing is compiled after the first, whatever the shapes."""
    from torch._dynamo.utils import counters

    model = wrapped()
    model.generate(**INPUTS, **GREEDY)
    before = {k: dict(v) for k, v in counters.items()}
    for i in range(50):
        rows = [prompt(1 + (7 * i + 3 * j) % 40, i) for j in range(1 + i % 9)]
        model.generate(**padded(rows), max_new_tokens=1 + i % 5, do_sample=bool(i % 2), seed=i)
    after = {k: dict(v) for k, v in counters.items()}
    compiled = ("stats", "frames", "graph_break", "inductor", "aot_autograd")
    assert {k: after.get(k) for k in compiled} == {k: before.get(k) for k in compiled}
    assert model.llm42.compilations == 1


def test_training_mode_has_no_dropout() -> None:
    model: Any = make("llama", attention_dropout=0.5)
    model.train()
    llm42c.deterministic(model, **ENGINE)
    assert model.training
    model.eval()
    with llm42c.deterministic.off(model):
        expected = model.generate(**INPUTS, **GREEDY)
    model.train()
    assert torch.equal(model.generate(**INPUTS, **GREEDY), expected)


@pytest.mark.parametrize("mode", ["autocast", "inference_mode", "grad", "default_dtype", "device"])
def test_modes_of_the_caller_change_nothing(mode: str) -> None:
    arguments = GREEDY | {"return_dict_in_generate": True}
    expected = wrapped().generate(**INPUTS, **arguments)
    default = torch.get_default_dtype()
    around: dict[str, Any] = {
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "inference_mode": torch.inference_mode(),
        "grad": torch.enable_grad(),
        "default_dtype": contextlib.nullcontext(),
        "device": torch.device("meta"),
    }
    try:
        torch.set_default_dtype(torch.float64 if mode == "default_dtype" else default)
        with around[mode]:
            there = wrapped().generate(**INPUTS, **arguments)
            fresh: Any = _new() if mode in ("autocast", "inference_mode") else wrapped()
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(there.sequences, expected.sequences)
    assert there.logprobs.dtype == torch.float32
    assert torch.equal(bits(there.logprobs), bits(expected.logprobs))
    assert torch.equal(fresh.generate(**INPUTS, **GREEDY), expected.sequences)  # also when it was made there


# -- decorators ----------------------------------------------------------------------------------------


def test_decorated_class(tmp_path: Any) -> None:
    @llm42c.deterministic(**ENGINE)
    class Mine(LlamaForCausalLM):
        """Doc."""

        def twice(self) -> int:
            return 2

    assert (Mine.__name__, Mine.__doc__) == ("Mine", "Doc.")
    plain().save_pretrained(tmp_path)
    model = Mine.from_pretrained(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    assert model.twice() == 2
    assert torch.equal(model.generate(**INPUTS, **GREEDY), wrapped().generate(**INPUTS, **GREEDY))
    assert model.llm42.compilations == 1
    assert list(model.generate_batch([[5, 6]], max_new_tokens=3)) == ["req_0"]
    expected, attributes = model.generate(**INPUTS, **GREEDY), set(model.__dict__)
    with llm42c.deterministic.off(model):
        assert not hasattr(model, "llm42")
        assert torch.equal(model.generate(**INPUTS, **GREEDY), expected)
        assert not hasattr(model, "llm42")
        assert not _is_packed(model)
        with pytest.raises(ValueError, match="is not deterministic"):
            llm42c.deterministic.undo(model)
    assert set(model.__dict__) == attributes
    model.generate(**INPUTS, **GREEDY)
    assert model.llm42.compilations == 1
    llm42c.deterministic.undo(model)
    assert torch.equal(model.generate(**INPUTS, **GREEDY), expected)
    assert not hasattr(model, "llm42")
    llm42c.deterministic(model, **ENGINE)
    assert torch.equal(model.generate(**INPUTS, **GREEDY), expected)
    assert LlamaForCausalLM.generate is GenerationMixin.generate  # the class itself is untouched


def test_an_instance_of_a_decorated_class_is_ordinary_until_its_first_use() -> None:
    decorated = llm42c.deterministic(**ENGINE)(LlamaForCausalLM)
    model = decorated(plain().config)
    assert "llm42" not in model.__dict__
    assert copy.deepcopy(model).lm_head.weight.shape == (VOCAB, 64)
    assert model.llm42.compilations == 0
    with pytest.raises(TypeError, match="use save_pretrained"):
        copy.deepcopy(model)


def test_decorated_function() -> None:
    @llm42c.deterministic
    def load(seed: int) -> Any:
        """Doc."""
        return make("llama", seed=seed)

    assert (load.__name__, load.__doc__) == ("load", "Doc.")

    @llm42c.deterministic(**ENGINE)
    def load_small() -> Any:
        return make("llama")

    assert torch.equal(load_small().generate(**INPUTS, **GREEDY), wrapped().generate(**INPUTS, **GREEDY))
    with pytest.raises(TypeError, match="returned a int"):
        llm42c.deterministic(lambda: 1)()


def test_wrapping_twice() -> None:
    model = _new()
    handle = model.llm42
    assert llm42c.deterministic(model, **ENGINE).llm42 is handle
    llm42c.deterministic(model, **(ENGINE | {"max_num_seqs": 4}))
    assert model.llm42 is not handle
    assert model.llm42.options["max_num_seqs"] == 4
    llm42c.deterministic.undo(model)
    assert "generate" not in model.__dict__


def test_clear_errors() -> None:
    with pytest.raises(OptionsError, match="did you mean 'max_num_seqs'"):
        llm42c.deterministic(make("llama"), max_num_seq=3)
    with pytest.raises(ConfigError, match="page_size must be a multiple of 16, not 8"):
        llm42c.deterministic(make("llama"), page_size=8)
    with pytest.raises(ConfigError, match="fast must be one of pinned, stock, not 'quick'"):
        llm42c.deterministic(make("llama"), fast="quick")
    for wrong in (3, torch.nn.Linear(2, 2), dict):
        with pytest.raises(TypeError, match="Hugging Face model"):
            llm42c.deterministic(wrong)


# -- models that are refused ---------------------------------------------------------------------------


def _small(**extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | extra


def _build(name: str, config: str, **settings: Any) -> Any:
    return getattr(transformers, name)(getattr(transformers, config)(**settings))


def _dynamic_rope() -> Any:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return _build("LlamaForCausalLM", "LlamaConfig", **_small(rope_parameters=rope))


def _vision() -> Any:
    text = {"model_type": "llama"} | _small()
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    return _build("LlavaForConditionalGeneration", "LlavaConfig", text_config=text, vision_config=vision)


def _mixed() -> Any:
    model = _build("LlamaForCausalLM", "LlamaConfig", **_small())
    model.lm_head.to(torch.float16)
    return model


def _nan() -> Any:
    model = _build("LlamaForCausalLM", "LlamaConfig", **_small())
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    return model


_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "head_dim": 16, "num_experts": 2}
REFUSED: dict[str, tuple[Any, str]] = {
    "mamba": (
        lambda: _build("MambaForCausalLM", "MambaConfig", vocab_size=99, hidden_size=32, num_hidden_layers=1),
        "recurrent state",
    ),
    "linear attention": (
        lambda: _build(
            "Qwen3NextForCausalLM",
            "Qwen3NextConfig",
            **_small(num_hidden_layers=4, num_experts_per_tok=1, **_LINEAR),
        ),
        "recurrent state",
    ),
    "encoder-decoder": (
        lambda: _build(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=99,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
        ),
        "encoder-decoder",
    ),
    "vision": (_vision, "vision_config"),
    "no generate": (
        lambda: _build(
            "BertModel",
            "BertConfig",
            **{k: v for k, v in _small().items() if not k.startswith("num_key")},
        ),
        "not a Hugging Face model with a generate method",
    ),
    "chunked attention": (
        lambda: _build(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            **_small(intermediate_size_mlp=32, head_dim=16, num_local_experts=2),
        ),
        "chunked_attention",
    ),
    "dynamic rope": (_dynamic_rope, "rope_type 'dynamic'"),
    "mixed dtypes": (_mixed, "float16, float32"),
    "float64": (lambda: _build("LlamaForCausalLM", "LlamaConfig", **_small()).double(), "float64"),
    "nan": (_nan, "NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models(name: str) -> None:
    build, reason = REFUSED[name]
    model = build()
    attributes = set(model.__dict__)
    with pytest.raises(ValueError, match=reason) as caught:
        llm42c.deterministic(model, **ENGINE)
    assert isinstance(caught.value, llm42c.errors.Llm42Error)
    assert "\n" not in str(caught.value)
    assert set(model.__dict__) == attributes


def test_an_engine_that_cannot_be_built_leaves_the_model_whole() -> None:
    model = make("llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match="does not hold one page"):
        llm42c.deterministic(model, **{**ENGINE, "kv_cache_bytes": 1})
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (torch.tensor([5, 6, 7]), r"not \[3\]: one prompt is input_ids\.unsqueeze\(0\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"not \[1, 2, 3\]"),
        (torch.ones(1, 3), "must hold token ids, not torch.float32"),
        ([[5, 6, 7]], "not a list; generate_batch takes lists"),
    ],
)
@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_prompts_that_are_no_batch(name: str, prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        wrapped("llama").generate(**{name: prompts}, max_new_tokens=2)
