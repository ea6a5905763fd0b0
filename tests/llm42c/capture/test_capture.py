"""Capturing one model leaves nothing behind that changes the capture of the next."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm42c.capture.dynamo import capture_packed


def _llama(heads: int, eps: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=64,
        rms_norm_eps=eps,
    )
    return LlamaForCausalLM(config).eval()


def test_numbers_stay_constants_when_another_model_had_others() -> None:
    torch.manual_seed(0)
    digests = []
    for heads, eps in ((4, 1e-5), (2, 1e-6), (4, 1e-5), (1, 1e-4)):
        captured = capture_packed(_llama(heads, eps))
        scales = [
            n.args[9] for n in captured.gm.graph.nodes if str(n.target).startswith("llm42.paged_attention")
        ]
        assert [type(s) for s in scales] == [float]
        assert scales[0] == (32 // heads) ** -0.5
        assert not any(isinstance(e, torch.SymFloat) for e in captured.example_inputs)
        digests.append(captured.digest)
    assert digests[0] == digests[2]
    assert len(set(digests)) == 3
