"""The tables of docs/results.md from the JSON files of the other benchmarks.

Command:  python experiments/benchmarks/tables.py OUT/*.json > OUT/tables.md
          FILE,FILE,..: one table of several trainings, with the mean of each figure and half of its range
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import across, cells_of, run

from dar_jax.errors import InputError


def section(files: list[Path]) -> str:
    """A heading, the date, machine and command of the first file, and the rows; reports of commands as a list."""
    report, *others = reports = [json.loads(file.read_text()) for file in files]
    lines = [f"## {files[0].stem}", ""]
    if others and len({len(each.get("rows", ())) for each in reports} | {0}) != 2:
        raise InputError(f"{', '.join(map(str, files))} have not the same rows")
    if "rows" in report:
        machine = report["machine"]
        name = machine["name"] if isinstance(machine, dict) else machine
        rows = [mean(each) for each in zip(*(report["rows"] for report in reports))] if others else report["rows"]
        heading, *rows = cells_of(rows)
        lines += [f"{report['date']}, {name}, jax {report['jax']}: `{report['command']}`", ""]
        lines += [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]
    else:
        lines += [f"- {name}: {value}" for name, value in report.items() if isinstance(value, int | float | str)]
    return "\n".join(lines) + "\n"


def mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of several reports. What is no number has to be the same in all."""
    found = {}
    for name in [name for name in rows[0] if name != "measured"]:
        values = [row.get(name) for row in rows]
        if all(isinstance(value, int | float) for value in values):
            found[name] = across(values)
        elif values.count(values[0]) == len(values):
            found[name] = values[0]
        else:
            raise InputError(f"{name} differs between the reports: {', '.join(map(str, values))}")
    return found


if __name__ == "__main__":
    run(lambda: print("\n".join(section([Path(file) for file in files.split(",")]) for files in sys.argv[1:])))
