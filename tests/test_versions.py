"""The versions that the project names in several files are one set."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llm42c import versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
APART = {"lm-eval", "plan-cost"}  # extras that the suite does without: they bring many packages along
LINTERS = {"ruff", "mypy"}  # they run with the fixed versions only


def _declared() -> dict[str, Requirement]:
    extras = [texts for name, texts in PROJECT["optional-dependencies"].items() if name not in APART]
    lists = [PROJECT["dependencies"], *extras]
    requirements = [Requirement(text) for texts in lists for text in texts]
    return {canonicalize_name(r.name): r for r in requirements}


def _fixed(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in pairs}


def _bounds(requirement: Requirement, operator: str) -> list[str]:
    return [s.version for s in requirement.specifier if s.operator == operator]


def test_every_dependency_has_both_bounds() -> None:
    for name, requirement in _declared().items():
        assert len(_bounds(requirement, ">=")) == 1, name
        assert name == "setuptools" or len(_bounds(requirement, "<")) == 1, name


def test_the_fixed_versions_lie_inside_the_bounds() -> None:
    fixed = _fixed("constraints.txt")
    for name, requirement in _declared().items():
        assert name in fixed, f"constraints.txt does not fix {name}"
        assert requirement.specifier.contains(fixed[name]), f"{name} {fixed[name]} is not {requirement}"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    lower = {name: _bounds(r, ">=")[0] for name, r in _declared().items() if name not in LINTERS}
    del lower["torch"]  # left to its range: the file says why
    oldest = _fixed("constraints-oldest.txt")
    assert oldest.keys() == lower.keys()
    for name, bound in lower.items():
        assert oldest[name] == bound or oldest[name].startswith(f"{bound}."), name


def test_the_tested_range_is_the_declared_one() -> None:
    """What a start checks (llm42c/versions.py) is what pip checks, and holds the fixed versions."""
    for package, (oldest, newest) in versions.TESTED.items():
        declared, fixed = _declared()[package], _fixed("constraints.txt")[package]
        assert versions.minor(_bounds(declared, ">=")[0]) == list(oldest), package
        assert versions.minor(_bounds(declared, "<")[0]) == [newest[0], newest[1] + 1], package
        assert list(oldest) <= versions.minor(fixed) <= list(newest), package
