"""Putting the text of a kernel file together."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

HEADER = '''"""{title}.

Emitted by llm42 for {subject}.
"""

import triton
import triton.language as tl
{imports}
{constants}
'''


def module(
    title: str,
    subject: str,
    constants: Mapping[str, int | float | bool | str],
    *functions: str,
    imports: str = "",
) -> str:
    """A Python file with the constants of a specialisation above its functions."""
    lines = "\n".join(f"{name} = tl.constexpr({value!r})" for name, value in constants.items())
    head = HEADER.format(title=title, subject=subject, imports=imports, constants=lines)
    bodies = [textwrap.dedent(f).strip("\n") for f in functions if f.strip()]
    return head.rstrip("\n") + "\n\n\n" + "\n\n\n".join(bodies) + "\n"
