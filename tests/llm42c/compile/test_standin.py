"""Stand-ins: what a stored graph needs of a model, without its code; a note that may be stale is not used."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import tiny_folder
import torch
from torch import nn

from llm42c.capture.packed import PackedInputs
from llm42c.compile import standin
from llm42c.compile.compiler import ModelCompiler
from llm42c.errors import WeightsError
from llm42c.hub import models


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path) -> Path:
    return tiny_folder.save(tmp_path / "model")


def note_of(folder: Path, dtype: torch.dtype | None = None) -> standin.Note | None:
    return standin.note_of(folder, standin.surroundings(dtype))


def noted(folder: Path) -> tuple[standin.Note, ModelCompiler]:
    """A note of the folder, and the compiler of the model that was loaded."""
    note = note_of(folder)
    assert note is not None
    compiler = ModelCompiler(models.load_model(folder)[0])
    compiler.compile()
    assert standin.remember(note, compiler, (2,), None)
    return note, compiler


def nothing() -> nn.Module:
    raise AssertionError("nobody asks for the model")


def logits(compiler: ModelCompiler) -> torch.Tensor:
    model = compiler.compile()
    inputs = PackedInputs(
        input_ids=tiny.ids(21),
        positions=torch.arange(21),
        slot_mapping=torch.arange(16, 37),
        cu_seqlens_q=torch.tensor([0, 21], dtype=torch.int32),
        kv_lens=torch.tensor([21], dtype=torch.int32),
        block_table=torch.tensor([[1, 2]], dtype=torch.int32),
        logits_indices=torch.arange(21),
    )
    return model.forward(inputs, model.new_kv_cache(4, 16))


def test_a_stand_in_computes_the_bits_of_the_model(folder: Path) -> None:
    note, loaded = noted(folder)
    recalled = standin.recall(note, nothing)
    assert recalled is not None
    assert dict(recalled.named_parameters()).keys() == dict(loaded.model.named_parameters()).keys()
    compiler = ModelCompiler(recalled)
    assert compiler.digest == loaded.digest
    assert compiler.compile().digest == loaded.compile().digest
    assert compiler.compile().computation == loaded.compile().computation
    expected = logits(loaded)
    assert torch.equal(logits(compiler), expected)
    with torch.no_grad():  # the guard: other weights would have shown
        recalled.get_parameter("model.norm.weight").mul_(2)
    with pytest.raises(standin.StaleError):
        ModelCompiler(recalled)


@pytest.mark.parametrize("change", ["config", "file", "dtype", "environment", "installed"])
def test_the_key_follows(change: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note, dtype = note_of(folder), None
    assert note == note_of(folder)
    if change == "config":
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    elif change == "file":
        (folder / "adapter_config.json").write_text("{}")
    elif change == "dtype":
        dtype = torch.float32
    elif change == "environment":
        monkeypatch.setenv("USE_HUB_KERNELS", "0")
    else:
        (folder / "new-1.0.dist-info").mkdir()
        monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    after = note_of(folder, dtype)
    assert note is not None
    assert after is not None
    assert after.path != note.path


def test_edited_code_of_the_model_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note, _ = noted(folder)
    assert standin.recall(note, nothing) is not None
    real = standin.digest_of_file
    edited = lambda path: "other" if path.name == "modeling_llama.py" else real(path)  # noqa: E731
    monkeypatch.setattr(standin, "digest_of_file", edited)
    assert standin.recall(note, nothing) is None


def test_files_that_change_while_the_model_is_loaded(folder: Path) -> None:
    note = note_of(folder)
    assert note is not None
    compiler = ModelCompiler(models.load_model(folder)[0])
    assert not standin.remember(dataclasses.replace(note, files=("others",)), compiler, (2,), None)
    assert standin.recall(note, nothing) is None


def test_other_weights_are_seen_before_anything_runs(folder: Path) -> None:
    note, _ = noted(folder)
    rewrite(folder, "model.norm.weight", lambda x: x + 1)
    recalled = standin.recall(note, nothing)
    assert recalled is not None
    with pytest.raises(standin.StaleError):
        ModelCompiler(recalled)


def test_damaged_weights_are_named_as_ever(folder: Path) -> None:
    note, _ = noted(folder)
    rewrite(folder, "model.norm.weight", lambda x: x * torch.nan)
    recalled = standin.recall(note, nothing)
    assert recalled is not None
    with pytest.raises(WeightsError, match=r"'model\.norm\.weight' hold NaN or infinity"):
        ModelCompiler(recalled)


def rewrite(folder: Path, name: str, change: Any) -> None:
    file = folder / "model.safetensors"
    state = safetensors.torch.load_file(file)
    state[name] = change(state[name])
    file.unlink()
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})


def test_without_a_stored_graph_the_model_is_wanted(folder: Path, own_cache: Path) -> None:
    note, _ = noted(folder)
    recalled = standin.recall(note, nothing)
    assert recalled is not None
    for stored in (own_cache / "llm42" / standin.FOLDER).glob("*.json"):
        stored.unlink()
    with pytest.raises(standin.StaleError):
        ModelCompiler(recalled)


def test_a_damaged_note_does_not_count(folder: Path) -> None:
    note, _ = noted(folder)
    note.path.write_bytes(note.path.read_bytes()[:-40] + bytes(40))
    assert standin.recall(note, nothing) is None


def test_a_parameter_that_is_in_no_file_is_not_noted(folder: Path) -> None:
    note = note_of(folder)
    model = models.load_model(folder)[0]
    model.register_parameter("more", nn.Parameter(torch.ones(3)))
    compiler = ModelCompiler(model)
    assert note is not None
    assert not standin.remember(note, compiler, (2,), None)
