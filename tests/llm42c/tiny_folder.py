"""A tiny random model with a word tokenizer in a folder: a MODEL for the command line."""

from __future__ import annotations

from pathlib import Path

import tiny
import tokenizers
import transformers as hf

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 101))]


def save_letters(folder: Path) -> Path:
    """As `save`, with a tokenizer of single characters: the printable ones of ASCII, and the newline."""
    letters = ["<pad>", "<s>", "</s>", *(chr(i) for i in range(33, 127)), "\u0120", "\u010a"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    wrapped = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tiny.model("llama").save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def save(folder: Path) -> Path:
    """Write the model and its tokenizer; words are `w3` to `w100`."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    tiny.model("llama").save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder
