"""The tables of docs/results.md from the JSON files of the other benchmarks.

Command:  python experiments/benchmarks/tables.py OUT/*.json > OUT/tables.md
"""

import json
import sys
from pathlib import Path
from typing import Any

from common import cells_of


def section(file: Path) -> str:
    """A heading, the date, machine and command, and the rows; reports of commands as a list."""
    report: dict[str, Any] = json.loads(file.read_text())
    lines = [f"## {file.stem}", ""]
    if "rows" in report:
        machine = report["machine"]
        name = machine["name"] if isinstance(machine, dict) else machine
        heading, *rows = cells_of(report["rows"])
        lines += [f"{report['date']}, {name}, jax {report['jax']}: `{report['command']}`", ""]
        lines += [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]
    else:
        lines += [f"- {name}: {value}" for name, value in report.items() if isinstance(value, int | float | str)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print("\n".join(section(Path(file)) for file in sys.argv[1:]))
