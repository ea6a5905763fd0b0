"""A process that surveys one class after another: a line of JSON in, lines of JSON out.

In: ``{"name", "model_type", "cells": [[dtype, path], ...], "options", "inductor"}``. Out, in this order:
``{"built": ...}`` with the kind of token mixing or the reason why there is no tiny model, then each cell.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import sys
import time
import warnings
from typing import Any, TextIO

_MAX_MEMORY_KB = 3 * 2**20


def _quiet() -> None:
    from transformers.utils import logging as hf_logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    hf_logging.set_verbosity_error()


def _survey(job: dict[str, Any], out: TextIO) -> None:
    import torch

    from llm42c.runtime.survey.cells import is_revealing, require_sane
    from llm42c.runtime.survey.classes import Decoder
    from llm42c.runtime.survey.mixing import mixing
    from llm42c.runtime.survey.tiny import CannotBuildError, one_line, tiny_model

    def say(**data: Any) -> None:
        print(json.dumps(data), file=out, flush=True)

    try:
        model_class, config_class = Decoder(job["name"], job["model_type"]).load()
        gc.freeze()  # what is imported stays: it need not be gone through again and again
        eager = tiny_model(model_class, config_class, torch.float32)
        require_sane(eager)
        say(built=True, mixing=mixing(eager), layers=_layers(eager))
    except CannotBuildError as error:
        say(built=False, told=str(error))
        return
    except Exception as error:
        say(built=False, told=f"eager: {one_line(error)}")
        return
    for dtype, path in job["cells"]:
        start = time.perf_counter()
        model = tiny_model(model_class, config_class, getattr(torch, dtype))
        revealing = is_revealing(model)
        state, told = _cell(model, eager, path, job)
        say(state=state, told=told, seconds=time.perf_counter() - start, revealing=revealing)
        del model
        torch._dynamo.reset()
        gc.collect()


def _cell(model: Any, eager: Any, path: str, job: dict[str, Any]) -> tuple[Any, str]:
    from llm42c.runtime.survey.cells import check_compile, check_generate, judge

    if path == "compile":
        return judge(lambda: check_compile(model, eager, job["options"], inductor=job["inductor"]))
    return judge(lambda: check_generate(model, eager))


def _layers(model: Any) -> int:
    return int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0))


def main() -> None:
    """Serve jobs from stdin until it ends, or until this process has grown large."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    _quiet()
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        _survey(json.loads(line), out)
        full = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > _MAX_MEMORY_KB
        print(json.dumps({"done": True, "full": full}), file=out, flush=True)
        if full:
            return


if __name__ == "__main__":
    main()
