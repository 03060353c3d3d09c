"""experiments/benchmarks/accelerator.sh: what it refuses, what it leaves out because it is done, and its tables."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "experiments" / "benchmarks" / "accelerator.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(*arguments):
    return subprocess.run(["bash", SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder to write to"),
        (["out", "--parts", "train_xxl"], "no part train_xxl; there are train_tokenizer"),
        (["out", "--parts", "cifar_fid"], "cifar_fid needs --data"),
        (["out", "--fast"], "no option --fast"),
    ],
)
def test_refused(arguments, message, tmp_path):
    done = run(*[tmp_path / "out" if word == "out" else word for word in arguments])
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_not_done_again_and_all_of_it_is_in_the_tables(tmp_path):
    rows = [{"tokens": 256, "ratio": 1.5, "measured": {"seconds": 1}}, {"tokens": 1024, "note": "out of memory"}]
    report = {"date": "2026-11-28", "machine": "a machine", "jax": "0.10", "command": "python attention.py", "rows": rows}
    (tmp_path / "attention.json").write_text(json.dumps(report))
    (tmp_path / "cifar_rfid.json").write_text(json.dumps({"psnr": 15.5, "notes": []}))
    done = run(tmp_path, "--parts", "attention,report", "--python", sys.executable)
    assert done.returncode == 0 and "== attention" not in done.stdout, done.stderr
    table = (tmp_path / "tables.md").read_text()
    assert "| tokens | ratio |\n| --- | --- |\n| 256 | 1.5 |\n| 1024 | out of memory |" in table
    assert "2026-11-28, a machine, jax 0.10: `python attention.py`" in table and "- psnr: 15.5" in table


def test_tables_of_several_trainings_are_means_with_half_of_the_range(tmp_path):
    about = {"date": "2026-11-28", "machine": "a machine", "jax": "0.10", "command": "python variants.py"}
    files = [tmp_path / f"{seed}.json" for seed in range(3)]
    for file, passes in zip(files, (10, 11, 13.5)):
        file.write_text(json.dumps({**about, "rows": [{"method": "base", "passes": passes, "exact": 1.0}]}))
    tables = [sys.executable, SCRIPT.with_name("tables.py"), ",".join(map(str, files))]
    assert "| base | 11.50 ± 1.75 | 1.000 |" in subprocess.run(tables, capture_output=True, text=True).stdout
    files[0].write_text(json.dumps({**about, "rows": [{"method": "other", "passes": 10, "exact": 1.0}]}))
    done = subprocess.run(tables, capture_output=True, text=True)
    assert done.returncode == 2 and "method differs between the reports: other, base" in done.stderr


def test_a_part_that_takes_too_long_is_left_for_the_next_time(tmp_path):
    done = run(tmp_path, "--parts", "train_l", "--minutes", 1)
    assert done.returncode == 0 and "train_l needs up to 6 minutes; give the same command again" in done.stdout
