"""Stands for llama-cpp-python in another interpreter: the next token is the last one plus 1, in any batch."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

__version__ = "0.0-fake"
VOCABULARY = 100
_rows: list[int | None] = []  # the token of each row of the last batch whose logits were wanted


def llama_backend_init() -> None:
    print("a line that is no answer")


def llama_model_default_params() -> SimpleNamespace:
    return SimpleNamespace()


llama_context_default_params = llama_model_default_params


def llama_model_load_from_file(path: bytes, params: Any) -> str | None:
    return None if b"broken" in path else path.decode()


def llama_init_from_model(model: str, params: Any) -> SimpleNamespace:
    assert params.n_batch == params.n_ubatch == 512
    return SimpleNamespace(params=params)


def llama_model_get_vocab(model: str) -> str:
    return model


def llama_vocab_n_tokens(vocab: str) -> int:
    return VOCABULARY


def llama_batch_init(size: int, embeddings: int, sequences: int) -> SimpleNamespace:
    lists = {name: [0] * size for name in ("token", "pos", "n_seq_id", "logits")}
    return SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(size)], **lists)


def llama_get_memory(context: Any) -> Any:
    return context


def llama_memory_clear(memory: Any, data: bool) -> None:
    _rows.clear()


def llama_decode(context: Any, batch: Any) -> int:
    assert 0 < batch.n_tokens <= context.params.n_batch
    _rows[:] = [batch.token[i] if batch.logits[i] else None for i in range(batch.n_tokens)]
    return 0


def llama_get_logits_ith(context: Any, row: int) -> Any:
    token = _rows[row]
    assert token is not None
    logits = (ctypes.c_float * VOCABULARY)()
    logits[(token + 1) % VOCABULARY] = 1.0
    return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
