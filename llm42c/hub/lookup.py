"""What can be known of a hub id before anything is downloaded: quickly, and without waiting for a network."""

from __future__ import annotations

import functools
import queue
import re
import threading
from pathlib import Path

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_id(text: str) -> bool:
    """Whether it is written like a hub id: ``org/name``, or ``name`` alone."""
    return _ID.fullmatch(text) is not None


def cached(name: str) -> Path | None:
    """The folder of a model in Hugging Face's cache, configuration and weights; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return folder if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")) else None


def download(name: str) -> Path:
    """The folder of a model's configuration, tokenizer and safetensors, fetched unless they are there."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(name, allow_patterns=patterns))


@functools.cache
def ask(name: str, seconds: float) -> str | None:
    """None if the hub has the model; else, after at most so many ``seconds``, what stands in the way.

    It is asked once a process, in a thread: looking up the hub's address heeds no time limit.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids asking the hub"
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_question(name, seconds)), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return f"the hub did not answer in {seconds:g} s"


def _question(name: str, seconds: float) -> str | None:
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=seconds)
    except errors.GatedRepoError:
        return "the hub wants you to accept its terms and to log in (hf auth login)"
    except errors.RepositoryNotFoundError:
        return "the hub has no such model, or it is private (hf auth login)"
    except errors.EntryNotFoundError:
        return "what the hub has under this name holds no config.json"
    except Exception as error:
        return (
            f"{constants.ENDPOINT} cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
        )
    return None
