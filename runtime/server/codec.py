"""Texts to token ids and back. Encoding runs in a thread of its own, never in the engine's or the loop's."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from transformers.convert_slow_tokenizer import bytes_to_unicode

from llm42c.errors import ConfigError
from llm42c.runtime.loader import text_decoder
from llm42c.runtime.server.errors import ApiError

T = TypeVar("T")


class Codec:
    """A transformers tokenizer for many requests at once."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """Raises ConfigError for a model without one."""
        if tokenizer is None:
            raise ConfigError("the model has no tokenizer, which a server needs")
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.decode = text_decoder(tokenizer)
        # One thread: an encoding leaves settings in the tokenizer, and the cores are the engine's.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="llm42-tokenizer")
        self._bytes = _byte_alphabet(tokenizer)
        self.token_bytes = functools.lru_cache(maxsize=2**16)(self._token_bytes)

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work(*arguments)` in the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    # -- to be called in the tokenizer's thread --------------------------------------------------------------

    def encode(self, text: str, special: bool = True, param: str = "prompt") -> list[int]:
        """Raises ApiError, which names `param`, for what is no text."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ApiError(400, f"{param} holds half a surrogate pair, which is no text", param) from None
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Messages through the model's chat template. Raises ApiError."""
        if not self._tokenizer.chat_template:
            raise ApiError(400, "the model has no chat template: use /v1/completions", "messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of the model's
            why = " ".join(str(error).split())[:200]
            raise ApiError(
                400, f"the model's chat template refuses the messages: {why}", "messages"
            ) from None
        return text

    # -- from any thread -------------------------------------------------------------------------------------

    def _token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character."""
        piece = self._tokenizer.convert_ids_to_tokens(token) if token < self._vocab_size else None
        if piece is None:
            return b""
        if self._bytes is not None and all(c in self._bytes for c in piece):
            return bytes(self._bytes[c] for c in piece)
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text.encode()

    def token_text(self, token: int) -> str:
        """As OpenAI writes it: `bytes:\\xe2\\x80` for what is no text alone."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def _byte_alphabet(tokenizer: Any) -> dict[str, int] | None:
    """How a byte-level tokenizer writes bytes; None for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or "ByteLevel" not in str(backend.decoder):
        return None
    return {character: byte for byte, character in bytes_to_unicode().items()}
