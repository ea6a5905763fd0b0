"""What the operator tests share."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

PRELUDE = """
import sys
sys.path.insert(0, {here!r})
import hashlib
import torch
from llm42c.codegen.cpu import build
from llm42c.codegen.ops import registry
registry.define()
build.load_library({isa!r})
def digest(*tensors):
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
"""


@pytest.fixture(scope="session")
def digest_on() -> Callable[[str, str], str]:
    """``digest_on(isa, code)``: runs code in a fresh process with the kernels compiled for an ISA.

    The code sees ``torch`` and prints what ``digest(*tensors)`` gives; what it printed is returned.
    """

    def run(isa: str, code: str) -> str:
        here = str(Path(__file__).parent)
        program = PRELUDE.format(isa=isa, here=here) + textwrap.dedent(code)
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run
