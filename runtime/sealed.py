"""Values as lines of JSON that show damage: a version, and a digest of everything else.

A line is canonical JSON (sorted keys, no spaces), so that a value has one text and an edit anywhere shows.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

from llm42c.errors import Llm42Error


def canonical(values: dict[str, Any]) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def seal(kind: str, version: int, body: dict[str, Any]) -> str:
    """`body` as a line without its end; field `kind` holds the version, `sha256` the digest of the rest."""
    values = {**body, kind: version}
    return canonical({**values, "sha256": _digest(values)})


def unseal(text: str, kind: str, version: int, name: str, error: type[Llm42Error]) -> dict[str, Any]:
    """What :func:`seal` was given, with `kind`. Raises `error` for any other text, calling it a `name`."""

    def refuse(why: str) -> NoReturn:
        raise error(why) from None

    try:
        values = json.loads(text)
        found = values[kind]
        digest = values.pop("sha256")
        intact = canonical({**values, "sha256": digest}) == text.removesuffix("\n")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        refuse(f"damaged: this is no {name} of llm42")
    if not intact or digest != _digest(values):
        refuse(f"damaged: the {name} is not as it was written")
    if found != version:
        refuse(f"this {name} has version {found}; this release of llm42 reads {version}")
    return dict(values)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(values).encode()).hexdigest()
