"""The notebook runs, is committed with its outputs, and its plain page says the same."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from common.run.inputs import ROOT

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
CELLS = nbformat.read(NOTEBOOK, as_version=4).cells


def test_the_plain_page_has_every_cell():
    page = (ROOT / "docs" / "tutorial.md").read_text()
    for cell in CELLS:
        assert cell.source.strip() in page, f"run jupyter nbconvert again: {cell.source[:60]}"


def test_it_is_committed_with_its_outputs():
    outputs = [output for cell in CELLS for output in cell.get("outputs", ())]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not re.search(r"/tmp/|/home/|/root/", str([o.get("text", "") for o in outputs]))


@pytest.mark.slow
def test_it_runs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT / "docs"}})
    run.execute()
    text = str([output for cell in run.nb.cells for output in cell.get("outputs", ())])
    assert "Traceback" not in text
