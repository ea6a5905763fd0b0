"""Prompts of many kinds and lengths, written for this project; one text file each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm42c.errors import RequestError


@dataclass(frozen=True)
class Prompt:
    """One prompt. `chat` prompts are questions to an assistant; the others are texts to continue."""

    name: str
    text: str
    chat: bool = False

    def token_ids(self, tokenizer: Any) -> list[int]:
        """Encode with a transformers tokenizer, through its chat template where there is one."""
        if self.chat and tokenizer.chat_template:
            messages = [{"role": "user", "content": self.text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(tokenizer(self.text)["input_ids"])


def load_prompts(folder: str | Path | None = None) -> list[Prompt]:
    """All `*.txt` of a folder (default: the ones shipped here), by name; `*.chat.txt` are chat prompts.

    The newline that ends a file is not part of its prompt. Raises RequestError for a folder without
    prompts, an empty file, or one that is not UTF-8.
    """
    root = Path(folder) if folder is not None else Path(__file__).parent
    if not root.is_dir():
        raise RequestError(f"no such folder of prompts: {root}")
    prompts = []
    for path in sorted(root.glob("*.txt")):
        try:
            text = path.read_text(encoding="utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is not UTF-8 text: {error}") from None
        if not text.strip():
            raise RequestError(f"{path} is empty")
        stem = path.name.removesuffix(".txt")
        prompts.append(Prompt(stem.removesuffix(".chat"), text, stem.endswith(".chat")))
    if not prompts:
        raise RequestError(f"no *.txt in {root}")
    return prompts
