"""`generate` and its relatives: Hugging Face prepares the call, the engine decodes its rows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from llm42c.errors import RequestError
from llm42c.runtime.drafters import AS_ENGINE, NgramDrafter, Speculate
from llm42c.runtime.hf import arguments as args
from llm42c.runtime.hf import stopping as stops
from llm42c.runtime.hf.output import DeterministicOutput
from llm42c.runtime.hf.processors import Recorder, RowProcessor, split
from llm42c.runtime.hf.rows import Row, Run
from llm42c.runtime.pump import Pump
from llm42c.runtime.sampling import SamplingParams


@dataclass
class Call:
    """A `generate` call after Hugging Face's own preparation."""

    model: Any
    input_ids: Tensor  # [B * copies, W]
    model_kwargs: dict[str, Any]
    config: Any  # the prepared GenerationConfig
    arguments: dict[str, Any]  # as the caller gave them
    seed: Any
    stopping: stops.Stopping
    speculate: Speculate = AS_ENGINE
    shift_max: bool = True  # max_length and min_length count the padding of a row
    shift_min: bool = True

    @property
    def width(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def copies(self) -> int:
        return int(self.config.num_return_sequences or 1)

    @property
    def together(self) -> bool:
        """Hugging Face pads rows that have ended only where there is a token that ends them."""
        return not self.stopping.eos_ids

    @property
    def wants_scores(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_scores)

    @property
    def wants_logits(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_logits)


def prepare(
    model: Any, original: Callable[..., Any], positional: Sequence[Any], keywords: dict[str, Any]
) -> Call:
    """Check a call, and let the model's own `generate` prepare it; what that raises passes through.

    Raises RequestError.
    """
    bound = inspect.signature(original).bind(*positional, **keywords).arguments
    arguments = {k: v for k, v in bound.items() if k != "kwargs"} | bound.get("kwargs", {})
    given = arguments.get("generation_config")
    args.require_batch(arguments)
    args.require_supported(arguments, given, model.generation_config)
    seed = args.effective("seed", arguments, given, model.generation_config)
    arguments.pop("seed", None)
    tokenizer = arguments.pop("tokenizer", None)
    stop_strings = args.effective("stop_strings", arguments, given, model.generation_config)
    if stop_strings is not None:
        _hide("stop_strings", arguments, model.generation_config)
    speculate = _drafter(model, arguments, given)

    def collect(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        return input_ids, generation_config, model_kwargs

    input_ids, config, model_kwargs = original(**arguments, custom_generate=collect)
    args.require_supported({}, config)
    args.require_known(model_kwargs)
    criteria = arguments.get("stopping_criteria") or ()
    stopping = stops.prepare(config, int(input_ids.shape[1]), criteria, tokenizer, stop_strings)
    seed = 0 if seed is None else seed
    return Call(model, input_ids, model_kwargs, config, arguments, seed, stopping, speculate)


def _drafter(model: Any, arguments: dict[str, Any], given: Any) -> Speculate:
    """Who drafts for the call's rows; Hugging Face is not told. Raises RequestError."""
    assistant = args.assistant_of(model, arguments)
    lookup = args.prompt_lookup(arguments, given, model.generation_config)
    if lookup is None:
        return AS_ENGINE if assistant is None else assistant
    if assistant is not None:
        raise RequestError("assistant_model and prompt_lookup_num_tokens: only one of them can draft")
    _hide("prompt_lookup_num_tokens", arguments, model.generation_config)
    return partial(NgramDrafter, lookup)


def _hide(name: str, arguments: dict[str, Any], default: Any) -> None:
    """Keep a setting from Hugging Face, because it is ours.

    It loses the tokenizer of stop strings on the way to `custom_generate`, and looks up prompts only in a
    batch of one.
    """
    arguments.pop(name, None)
    if arguments.get("generation_config") is not None:
        arguments["generation_config"] = copy.deepcopy(arguments["generation_config"])
        setattr(arguments["generation_config"], name, None)
    if getattr(default, name) is not None:
        arguments[name] = None


def make_rows(call: Call, prompts: Sequence[list[int]]) -> list[Row]:
    """The requests of a call. prompts: without padding, one for each row and copy."""
    seeds = args.row_seeds(call.seed, len(prompts) // call.copies, call.copies)
    return [_row(call, i, prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]


def _row(call: Call, index: int, prompt: list[int], seed: int) -> Row:
    config = _on_cpu(call.config)
    padding = call.width - len(prompt)
    max_new_tokens = call.stopping.max_new_tokens
    if call.shift_max:
        config.max_length -= padding
    else:
        max_new_tokens += padding
    if config.min_length and call.shift_min:
        config.min_length = max(0, config.min_length - padding)
    if max_new_tokens < 1:
        raise RequestError(f"row {index}: {len(prompt)} prompt tokens leave nothing of max_length")
    processors = _processors(call, config, index, prompt)
    rest, sampling = split(processors, bool(config.do_sample))
    row_processor = RowProcessor(rest) if rest else None
    recorder = Recorder(len(prompt)) if call.wants_scores or call.wants_logits else None
    params = SamplingParams(
        max_tokens=max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=seed,
        stop_token_ids=call.stopping.eos_ids,
        ignore_eos=True,
        logits_processors=tuple(p for p in (recorder, row_processor) if p is not None),
        detokenize=False,
    )
    return Row(
        index,
        prompt,
        params,
        replace(call.stopping, max_new_tokens=max_new_tokens),
        row_processor,
        recorder,
        processors if call.wants_scores else None,
        call.speculate,
    )


def _on_cpu(config: Any) -> Any:
    """A copy whose tensors of special tokens lie where rows are processed."""
    copied = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, Tensor):
            setattr(copied, name, value.cpu())
    return copied


def _processors(call: Call, config: Any, index: int, prompt: list[int]) -> list[Any]:
    """Hugging Face's processors for this row as if it were the whole batch."""
    allowed, batch_id = call.arguments.get("prefix_allowed_tokens_fn"), index
    processors = list(
        call.model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=torch.tensor([prompt]),
            prefix_allowed_tokens_fn=None if allowed is None else lambda _, ids: allowed(batch_id, ids),
            logits_processor=logits_process.LogitsProcessorList(call.arguments.get("logits_processor") or ()),
            device="cpu",
            model_kwargs={},
            negative_prompt_ids=None,
            negative_prompt_attention_mask=None,
        )
    )
    for processor in processors:
        if isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
            # Releases of transformers differ in whether the copies of a prompt share its number.
            batch_id, processor._num_beams = index // processor._num_beams, 1
    return processors


def generate(call: Call, pump: Pump) -> Any:
    """Decode a prepared call; returns what Hugging Face's `generate` returns."""
    prompts = args.rows_of(
        call.input_ids, call.model_kwargs.get("attention_mask"), call.model_kwargs.get("position_ids")
    )
    rows = make_rows(call, prompts)
    streamer = call.arguments.get("streamer")
    stopping = call.stopping
    stream = bool(streamer is not None or stopping.criteria or stopping.deadline is not None)
    sent = 0
    with Run(pump, rows, stream=stream, together=call.together) as run:
        for _ in run.drive():
            _raise_first(rows)
            if streamer is not None:
                sent = _feed(streamer, call, run, sent)
    _raise_first(rows)
    if streamer is not None:
        streamer.end()
    return _assemble(call, rows, run.length or 0)


def _raise_first(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.error is not None:
            raise row.error


def _token_at(call: Call, row: Row, step: int) -> int | None:
    """Output `step` of a row, the padding after its end, or None if it is not known yet."""
    if not call.together and row.end is not None and step >= row.end:
        return _pad_id(call)
    return row.tokens[step] if step < len(row.tokens) else None


def _pad_id(call: Call) -> int:
    pad = call.config._pad_token_tensor
    return 0 if pad is None else int(pad)


def _feed(streamer: Any, call: Call, run: Run, sent: int) -> int:
    """Give the streamer the steps that every row has committed; returns how many it has now."""
    while run.length is None or sent < run.length:
        step = [_token_at(call, row, sent) for row in run.rows]
        if None in step:
            break
        streamer.put(torch.tensor(step))
        sent += 1
    return sent


def _assemble(call: Call, rows: Sequence[Row], length: int) -> Any:
    steps = [[_token_at(call, row, i) for i in range(length)] for row in rows]
    new = torch.tensor(steps, dtype=torch.int64, device=call.input_ids.device).view(len(rows), length)
    sequences = torch.cat([call.input_ids, new], dim=1)
    if not call.config.return_dict_in_generate:
        return sequences
    logprobs = torch.zeros(len(rows), length, dtype=torch.float32)
    lengths = torch.tensor([length if call.together else row.end for row in rows])
    for values, row, end in zip(logprobs, rows, lengths.tolist(), strict=True):
        values[:end] = torch.tensor(row.logprobs[:end], dtype=torch.float32)
    parts: dict[str, Any] = {"sequences": sequences, "logprobs": logprobs, "lengths": lengths}
    if call.wants_scores:
        parts["scores"] = _per_step([r.scores for r in rows], length, call)
    if call.wants_logits:
        parts["logits"] = _per_step([r.logits for r in rows], length, call)
    return DeterministicOutput(**parts)


def _per_step(rows: list[list[Tensor]], length: int, call: Call) -> tuple[Tensor, ...]:
    """rows: for each row its steps [V] → for each step [B, V]."""
    zero = torch.zeros_like(rows[0][0]) if length else torch.empty(0)
    return tuple(
        torch.stack([row[i] if i < len(row) else zero for row in rows]).to(call.input_ids.device)
        for i in range(length)
    )
