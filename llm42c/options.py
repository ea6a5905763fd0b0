"""Options of ``torch.compile(model, backend="llm42", options={...})``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from llm42c.errors import OptionsError

if TYPE_CHECKING:
    from llm42c.passes.base import Pass

Reductions = Literal["fixed", "free"]
TokenWeave = Literal["off", "auto", "always"]


@dataclass(frozen=True)
class Options:
    """How a model is compiled.

    reductions: ``"fixed"`` gives every row of a result the same bits whatever batch it stands in;
        ``"free"`` leaves the model to Inductor unchanged.
    strict: refuse a model with a part whose order of reduction is not known, instead of compiling it.
    token_weave: what to do with the all-reduces of a model that is divided among ranks
        (docs/token_weaving.md). ``"auto"`` overlaps them with the other half of the tokens where the cost
        model predicts a gain, and leaves a graph as it is where that cannot be done; ``"always"`` does it
        wherever there are two tokens, and refuses a graph that cannot be divided.
    residual_shards: each rank keeps its own rows of the residual stream between two fused norms
        (docs/tensor_parallel.md); refuses a graph in which nothing can be kept so. For long prefills.
    target: file with the rates of the device and its link, as ``Device.to_json`` writes it, from which
        ``token_weave`` decides; by default rank 0 measures them.
    dump: directory for graphs before and after each pass and for the generated kernels; the
        environment variable ``LLM42_DUMP`` gives the default.
    passes: passes of other packages that run too, each a ``llm42c.passes.base.Pass``, its place as
        ``"package.module:name"``, or an entry point of the group ``llm42c.passes`` (docs/compile.md).
    """

    reductions: Reductions = "fixed"
    strict: bool = False
    token_weave: TokenWeave = "off"
    residual_shards: bool = False
    target: str | None = None
    dump: str | None = None
    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Check ``options`` as given by a user.

        Raises OptionsError for an unknown key (naming the nearest known one), for a value of the wrong
        type, for options that exclude each other, for a name in ``passes`` that leads to none, and for a
        ``mode``: modes are Inductor's.
        """
        if mode not in (None, "default"):
            raise OptionsError(
                f"backend 'llm42' has no mode {mode!r}; use options=, for example "
                'options={"reductions": "fixed"}'
            )
        given = dict(options or {})
        hints = get_type_hints(cls, localns={"Pass": object})  # passes are looked up instead
        known = [f.name for f in fields(cls)]
        for key, value in given.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
                raise OptionsError(
                    f"unknown option {key!r}; did you mean {near[0]!r}? (known: {', '.join(known)})"
                )
            if key == "passes":
                from llm42c.compile.added_passes import (
                    find_passes,  # imports torch; --help imports this module
                )

                given[key] = find_passes(value)
            else:
                _check(key, value, hints[key])
        parsed = cls(**given)
        if parsed.residual_shards and parsed.reductions == "free":
            raise OptionsError("residual_shards needs reductions='fixed': it divides llm42 operators")
        if parsed.passes and parsed.reductions == "free":
            raise OptionsError("passes need reductions='fixed': 'free' leaves the model to Inductor as it is")
        return parsed


def _check(key: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise OptionsError(f"option {key!r} must be one of {get_args(hint)}, got {value!r}")
    elif not isinstance(value, get_args(hint) or hint):
        wanted = " or ".join(t.__name__ for t in (get_args(hint) or (hint,)))
        raise OptionsError(f"option {key!r} must be {wanted}, got {value!r}")
