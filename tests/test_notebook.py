"""The notebook of the docs runs from top to bottom, and is stored without outputs."""

import json
from pathlib import Path

import matplotlib

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


def test_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    matplotlib.use("Agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    namespace = {}
    for cell in cells:
        exec("".join(cell["source"]), namespace)
    assert namespace["decoded"].shape == namespace["digits"].shape
    assert namespace["bits"].shape == namespace["codes"].shape
