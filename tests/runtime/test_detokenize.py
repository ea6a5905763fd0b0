"""Text that grows token by token equals the text of all tokens at once, for the decoders that models have."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from llm42c.runtime.processors import STUCK_WINDOW, TextState

TEXTS = [
    "The cat sat on the mat, and  then left.",
    "naïve café — déjà vu “quoted” …",
    "日本語のテキストと漢字、かな。",
    "emoji 😀😃👩‍👩‍👧‍👦 and 🏳️‍🌈 flags",
    " leading and trailing spaces   \n\n\ttabs",
    "עברית العربية हिन्दी ไทย",
]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: tokens are strings of bytes, and may end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral: "▁" is a space, the first one is dropped, unknown characters are bytes."""
    pieces = [
        "<unk>",
        *SPECIAL,
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"abcdehlnorstu.,",
        "▁the",
        "▁c",
        "at",
    ]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


class Counted:
    """A decode function that counts what it is asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[int] = []

    def __call__(self, ids: list[int]) -> str:
        self.lengths.append(len(ids))
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def spoken(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, list[str], list[int]]:
    """The final text, the text after each token, and the lengths that were decoded."""
    decode = Counted(tokenizer)
    state, texts = TextState(decode, ()), []
    for token in ids:
        state.push(token)
        texts.append(state.text)
    state.finish(False, False)
    return state.text, texts, decode.lengths


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        return tokenizer.encode(text).ids
    vocab, ids = tokenizer.get_vocab(), []
    for char in "▁" + text.replace(" ", "▁"):
        ids += [vocab[char]] if char in vocab else [vocab[f"<0x{b:02X}>"] for b in char.encode()]
    return ids


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", [*TEXTS, " ".join(TEXTS * 3)])
def test_texts(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = encode(tokenizer, text)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    final, texts, lengths = spoken(tokenizer, ids)
    assert final == whole
    assert all(whole.startswith(t) for t in texts)
    assert len(lengths) <= 1.35 * len(ids) + 2
    assert sum(lengths) <= 9 * len(ids)


def test_characters_are_split_over_tokens_here() -> None:
    for tokenizer in TOKENIZERS.values():
        ids = encode(tokenizer, " ".join(TEXTS))
        assert any("\ufffd" in tokenizer.decode([i]) for i in ids), "vacuous"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_anywhere(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    rng = random.Random(0)
    special = [tokenizer.token_to_id(t) for t in SPECIAL]
    for text in TEXTS * 3:
        ids = encode(tokenizer, text)
        for _ in range(10):
            # Between whole characters: where nobody knows what a character is, a special token decides.
            at = rng.randrange(len(ids) + 1)
            if "\ufffd" not in tokenizer.decode(ids[:at]) + tokenizer.decode(ids[at:]):
                ids[at:at] = rng.choices(special, k=rng.randrange(1, 4))
        assert spoken(tokenizer, ids)[0] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_long_runs_without_text_stay_cheap(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    special, hello = tokenizer.token_to_id("</s>"), encode(tokenizer, "the cat")
    lone = tokenizer.token_to_id("<0xE2>") or encode(tokenizer, "日")[0]
    for run in ([special] * 500, [lone] * 500):
        final, _, lengths = spoken(tokenizer, hello + run + hello)
        assert final.startswith("the cat")
        assert final.endswith("the cat" if run[0] == special else "the cat"[1:])
        assert max(lengths) <= STUCK_WINDOW + len(hello) + 1
        assert len(lengths) <= 2 * len(hello + run + hello)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_text_and_any_copy(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    text = data.draw(st.text(alphabet="the cat日é😀 \n.", max_size=60))
    ids = encode(tokenizer, text)
    cut = data.draw(st.integers(0, len(ids)))
    decode: Callable[[list[int]], str] = Counted(tokenizer)
    state = TextState(decode, ())
    for token in ids[:cut]:
        state.push(token)
    twin = state.copy()
    for token in data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=20)):
        state.push(token)  # proposals that are thrown away
    for token in ids[cut:]:
        twin.push(token)
    twin.finish(False, False)
    assert twin.text == tokenizer.decode(ids, skip_special_tokens=True)
