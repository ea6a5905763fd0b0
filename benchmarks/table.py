"""Print a result file as a Markdown table for docs/benchmarks.md.

python benchmarks/table.py benchmarks/results/FILE.csv [COLUMN …]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

# The same in every row: said once below the table.
CONSTANT = ("command", "cpu", "cores", "threads", "isa", "torch", "transformers", "llm42")


def table(rows: list[dict[str, str]], columns: list[str]) -> str:
    """Rows as Markdown, with the command and the machine below."""
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    facts = "; ".join(f"{name} {rows[0][name]}" for name in CONSTANT if rows[0].get(name))
    return f"{text}\n\n{facts}"


def main(path: Path, columns: list[str]) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    varying = [name for name in rows[0] if name not in CONSTANT and any(row[name] for row in rows)]
    print(table(rows, columns or varying))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
