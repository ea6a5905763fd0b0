"""`llm42 generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm42c.cli import parallel
from llm42c.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    FastOption,
    ModelArgument,
    PassOption,
    PlannedKvOption,
    PlannedSpeculateOption,
    PlanOption,
    TokenWeaveOption,
    VerifyOption,
    open_engine,
    progress_bars,
    read_text,
    write_text,
)
from llm42c.cli.running import open_journal, run, show
from llm42c.errors import RequestError
from llm42c.prompts import Prompt

if TYPE_CHECKING:
    from llm42c.runtime.signing import Signer


def generate(
    model: ModelArgument = DEFAULT_MODEL,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="'-' reads one from stdin.")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file", "-f", exists=True, dir_okay=False, help="A file that holds one prompt; repeatable."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts through the model's chat template.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic/--no-deterministic", help="Same bits whatever else runs.")
    ] = True,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens to generate.")] = 128,
    min_tokens: Annotated[int, typer.Option("--min-tokens", help="No stop before so many.")] = 0,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Default: derived from the prompt.")] = None,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty")] = 1.0,
    frequency_penalty: Annotated[float, typer.Option("--frequency-penalty")] = 0.0,
    presence_penalty: Annotated[float, typer.Option("--presence-penalty")] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A string that ends the text; repeatable.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of sequence.")] = False,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="With --json: the N likeliest of each step.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE", help="The output is JSON of this schema.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="The output matches it, whole.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option("--choice", help="The output is one of them; repeatable.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar", metavar="FILE", help="The output is of this Lark grammar.")
    ] = None,
    json_out: Annotated[bool, typer.Option("--json", help="One line of JSON a prompt.")] = False,
    receipt: Annotated[
        Path | None, typer.Option("--receipt", metavar="FILE", help="Write a receipt a prompt, one a line.")
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option("--sign", metavar="KEY.pem", help="With --receipt: sign with this Ed25519 key."),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            "--journal", metavar="FILE", help="Append tokens as they commit; llm42 resume FILE goes on there."
        ),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    fast: FastOption = "pinned",
    verify: VerifyOption = "auto",
    kv_mb: PlannedKvOption = None,
    speculate: PlannedSpeculateOption = None,
    plan: PlanOption = None,
    token_weave: TokenWeaveOption = "off",
    passes: PassOption = None,
) -> None:
    """Generate text. One prompt is printed as it comes; several are run together and printed in order."""
    signer = _signer(sign, receipt)
    if journal is not None and not deterministic:
        raise RequestError("--journal is for deterministic requests")
    texts = _texts(prompts or [], file or [])
    from llm42c.runtime.sampling import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        json_schema=None if json_schema is None else read_text("the schema", json_schema),
        regex=regex,
        choice=tuple(choice) if choice else None,
        grammar=None if grammar is None else read_text("the grammar", grammar),
    )
    record = open_journal(journal)
    with progress_bars() as report:
        built = open_engine(
            model,
            report,
            dtype=dtype,
            device=device,
            fast=fast,
            verify=verify,
            kv_mb=kv_mb,
            speculate=speculate,
            plan=plan,
            token_weave=token_weave,
            passes=passes,
        )
        ids = [Prompt(str(i), text, chat).token_ids(built.tokenizer) for i, text in enumerate(texts)]
        names = [
            built.engine.submit(prompt, params, deterministic=deterministic, receipt=receipt is not None)
            for prompt in ids
        ]
        if record is not None:
            record.begin(names, list(map(built.engine.export, names)))
        stream = len(ids) == 1 and not json_out
        if not stream:
            total = len(ids) * max_tokens
            outputs = run(built, names, report=lambda n: report("decoding", n, total), journal=record)
    if stream:
        outputs = run(built, names, echo=True, journal=record)
    if receipt is not None:
        receipts = [o.receipt for o in outputs if o.receipt is not None]
        if signer is not None:
            receipts = [r.signed(signer) for r in receipts]
        write_text(receipt, "".join(f"{r.to_json()}\n" for r in receipts))
    show(built, outputs, json_out, stream)


def _signer(key: Path | None, receipt: Path | None) -> Signer | None:
    if key is None:
        return None
    if receipt is None:
        raise RequestError("--sign signs receipts: say with --receipt FILE where they go")
    from llm42c.runtime.signing import Signer

    return Signer.read(key)


def _texts(prompts: list[str], files: list[Path]) -> list[str]:
    """Prompts from arguments, then files; stdin for '-' or when nothing else is given."""
    if not prompts and not files:
        if not parallel.silent() and (sys.stdin is None or sys.stdin.isatty()):
            raise RequestError(
                "no prompt: give one after MODEL (llm42 generate smollm2 'Once upon a time'), "
                "with --file, or on stdin"
            )
        prompts = ["-"]
    texts = [parallel.read_stdin().removesuffix("\n") if p == "-" else p for p in prompts]
    for path in files:
        texts.append(read_text("the prompt", path).removesuffix("\n"))
    if any(not text for text in texts):
        raise RequestError("a prompt is empty")
    return texts
