"""The notebook of the tour: it runs, and holds its own results."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path("examples/tour.ipynb")


def outputs(notebook, kind):
    return [o for cell in notebook.cells for o in cell.get("outputs", ()) if kind in str(o)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tour_runs_and_learns():
    kept = nbformat.read(TOUR, as_version=4)
    notebook = nbformat.read(TOUR, as_version=4)
    folder = {"metadata": {"path": str(TOUR.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    assert len(outputs(notebook, "image/png")) == len(outputs(kept, "image/png")) == 5
    for book in (notebook, kept):
        told = [o.text for o in outputs(book, "accuracy on new images")]
        shares = [int(line.split()[-1].rstrip("%")) for t in told for line in t.splitlines()
                  if line.startswith("accuracy")]  # fmt: skip
        assert len(shares) == 2
        assert min(shares) >= 90  # chance is 33
