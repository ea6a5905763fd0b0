"""`generate_batch`: lists of token ids in, a dict of outputs in Hugging Face's shape out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from llm42c.errors import RequestError
from llm42c.runtime.hf import arguments as args
from llm42c.runtime.hf.generate import Call, make_rows, prepare
from llm42c.runtime.hf.rows import Row, Run
from llm42c.runtime.pump import Pump

# Of Hugging Face's own generate_batch; they tune its engine, not the result.
_IGNORED = ("continuous_batching_config", "persistent_manager", "warmup")


def prepare_batch(
    model: Any,
    original: Callable[..., Any],
    inputs: Sequence[Sequence[int]],
    generation_config: Any,
    keywords: dict[str, Any],
) -> tuple[Call, list[list[int]]]:
    """The call that all prompts share, and the prompts with their copies. Raises RequestError."""
    prompts = [_ids(i, prompt) for i, prompt in enumerate(inputs)]
    for name in _IGNORED:
        keywords.pop(name, None)
    if keywords.get("streamer") is not None:
        raise RequestError("streamer: only generate takes one; model.llm42.stream yields tokens as they come")
    longest = torch.tensor([max(prompts, key=len)])
    keywords = {"generation_config": generation_config, "attention_mask": torch.ones_like(longest)} | keywords
    keywords["inputs"] = longest
    call = prepare(model, original, (), keywords)
    sources = (generation_config, model.generation_config)
    # A prompt has no padding here: max_length and min_length count the prompt's own tokens.
    call.shift_max = _relative("max_new_tokens", "max_length", keywords, sources)
    call.shift_min = _relative("min_new_tokens", "min_length", keywords, sources)
    return call, [prompt for prompt in prompts for _ in range(call.copies)]


def _relative(new: str, total: str, keywords: dict[str, Any], sources: Sequence[Any]) -> bool:
    return (
        args.effective(new, keywords, *sources) is not None
        or args.effective(total, keywords, *sources) is None
    )


def _ids(index: int, prompt: Any) -> list[int]:
    if hasattr(prompt, "tolist"):  # a tensor or an array, [n] or [1, n]
        prompt = prompt.tolist()
        prompt = prompt[0] if len(prompt) == 1 and isinstance(prompt[0], list) else prompt
    if not prompt or not all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
        raise RequestError(f"inputs[{index}] must be a non-empty list of token ids")
    return list(prompt)


def generate_batch(
    call: Call,
    prompts: list[list[int]],
    pump: Pump,
    *,
    record_timestamps: bool = False,
    progress_bar: bool = False,
) -> dict[str, GenerationOutput]:
    """Decode the prompts; a request that fails carries its error and the others go on."""
    rows = make_rows(call, prompts)
    outputs = {
        _key(row, call.copies): GenerationOutput(_key(row, call.copies), prompt_ids=row.prompt)
        for row in rows
    }
    started = time.perf_counter()
    with Run(pump, rows, stream=record_timestamps or bool(call.stopping.criteria), together=False) as run:
        bar = _progress(len(rows), progress_bar)
        for changed in run.drive():
            for row in changed:
                output = outputs[_key(row, call.copies)]
                if record_timestamps:
                    stamps = output.timestamps or []
                    output.timestamps = stamps + [time.perf_counter()] * (len(row.tokens) - len(stamps))
                if (row.end is not None or row.error is not None) and not output.is_finished():
                    _finish(output, row, started)
                    bar.update(1)
        bar.close()
    return outputs


def _key(row: Row, copies: int) -> str:
    request, copy = divmod(row.index, copies)
    return f"req_{request}" if copy == 0 else f"req_{request}__child#{copy - 1}"


def _finish(output: GenerationOutput, row: Row, started: float) -> None:
    output.generated_tokens = row.tokens
    output.logprobs = row.logprobs
    output.lifespan = (started, time.perf_counter())
    output.error = None if row.error is None else str(row.error)
    output.status = RequestStatus.FINISHED if row.error is None else RequestStatus.FAILED


def _progress(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, disable=not shown, desc="generate_batch", unit="request")
