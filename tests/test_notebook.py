"""The notebook of the docs runs from top to bottom, and is stored without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from many_hosts import CACHE, FASTER, FLAGS

ROOT = Path(__file__).parent.parent


def test_notebook(tmp_path):
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    check = "assert decoded.shape == digits.shape and bits.shape == codes.shape and report['fast']"
    own = {"XLA_FLAGS": f"{FLAGS} {FASTER}", "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    own |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": CACHE}
    subprocess.run([sys.executable, "-c", f"{code}\n{check}"], cwd=tmp_path, env=os.environ | own, check=True)
