"""`llm42 chat`: a conversation on the terminal whose answers come again, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from llm42c.cli import parallel
from llm42c.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    KvOption,
    ModelArgument,
    PassOption,
    SpeculateOption,
    open_engine,
    out,
    progress_bars,
    write_text,
)
from llm42c.errors import ConfigError, Llm42Error, RequestError

if TYPE_CHECKING:
    from llm42c.runtime.loader import BuiltEngine
    from llm42c.runtime.outputs import RequestOutput
    from llm42c.runtime.sampling import SamplingParams

HELP = """\
/seed N        noise of the answers that follow; the same conversation with the same seed has the same answers
/again         the last question once more, and whether its answer has the same bits
/receipt FILE  what the last answer was computed from, for llm42 replay; without FILE it is shown
/system TEXT   begin anew with a system message
/reset         begin anew
/exit          end, as Ctrl-D does; Ctrl-C ends an answer"""


def chat(
    model: ModelArgument = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option("--system", help="What the assistant is told first.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Of an answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", help="1 is off.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    kv_mb: KvOption = 256,
    speculate: SpeculateOption = "auto",
    passes: PassOption = None,
) -> None:
    """Talk to MODEL through its chat template; answers are deterministic, and /help lists commands."""
    if parallel.announced():
        raise ConfigError("llm42 chat reads from one terminal: run it without torchrun")
    from llm42c.runtime.sampling import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with progress_bars() as report:
        built = open_engine(
            *(model, report), dtype=dtype, device=device, kv_mb=kv_mb, speculate=speculate, passes=passes
        )
    if not getattr(built.tokenizer, "chat_template", None):
        raise ConfigError(f"{model} has no chat template: llm42 generate continues texts")
    talk = Conversation(built, params, system)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited and called back
        out.print(Text(f"contract {built.engine.contract.hash[:16]}, seed {seed}; /help", "dim"))
    while (line := _read()) is not None:
        try:
            if not talk.hear(line):
                return
        except Llm42Error as error:
            out.print(Text(str(error), "red"))


def _read() -> str | None:
    """The next line that says something; None at the end."""
    prompt = "\n> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()
            continue
        if line:
            return line


class Conversation:
    """Messages, and the last answer. Every question is asked with all that was said before it."""

    def __init__(self, built: BuiltEngine, params: SamplingParams, system: str | None) -> None:
        self.built, self.params = built, params
        self.messages: list[dict[str, str]] = []
        self.last: RequestOutput | None = None
        self.begin(system)

    def begin(self, system: str | None) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []
        self.last = None

    def hear(self, line: str) -> bool:
        """Answer a line, or do what it says; False at the end. Raises RequestError."""
        if not line.startswith("/"):
            self.ask([*self.messages, {"role": "user", "content": line}])
            return True
        name, _, rest = line[1:].partition(" ")
        if name in ("exit", "quit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: out.print(HELP, markup=False, highlight=False),
            "seed": self.seed,
            "again": lambda _: self.again(),
            "receipt": self.receipt,
            "system": self.begin,
            "reset": lambda _: self.begin(None),
        }
        if name not in commands:
            raise RequestError(f"/{name} is no command; /help lists them")
        commands[name](rest.strip())
        return True

    def ask(self, messages: list[dict[str, str]]) -> RequestOutput | None:
        """Stream the answer; what was interrupted is no part of the conversation, nor is its question."""
        tokenizer: Any = self.built.tokenizer
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        output = self._stream(self.built.engine.submit(prompt, self.params, receipt=True))
        if output is None:
            return None
        if output.error is not None:
            raise RequestError(output.error)
        self.messages = [*messages, {"role": "assistant", "content": output.text}]
        self.last = output
        return output

    def _stream(self, request_id: str) -> RequestOutput | None:
        engine = self.built.engine
        try:
            while engine.has_unfinished():
                for output in engine.step():
                    print(output.new_text, end="", flush=True)
                    if output.finished:
                        print()
                        return output
        except KeyboardInterrupt:
            engine.abort(request_id)
            print()
        return None

    def seed(self, text: str) -> None:
        try:
            self.params = dataclasses.replace(self.params, seed=int(text))
        except ValueError:
            raise RequestError("/seed takes an integer") from None

    def again(self) -> None:
        """Amid other noise an answer would be the same; here it is asked alone."""
        before = self._answered()
        again = self.ask(self.messages[:-1])
        if again is not None:
            same = (again.token_ids, again.logprobs) == (before.token_ids, before.logprobs)
            said = "the same tokens and log-prob bits" if same else "another answer: the seed has changed"
            out.print(Text(said, "green" if same else "yellow"))

    def receipt(self, path: str) -> None:
        receipt = self._answered().receipt
        assert receipt is not None
        if not path:
            print(receipt.to_json())
            return
        write_text(Path(path), f"{receipt.to_json()}\n")
        out.print(Text(f"written: llm42 replay {path}", "dim"))

    def _answered(self) -> RequestOutput:
        if self.last is None:
            raise RequestError("there is no answer yet")
        return self.last
