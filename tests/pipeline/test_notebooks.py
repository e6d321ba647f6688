"""The stored notebooks: short cells, prose first, nothing of one machine, and only names that
exist.
"""

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest

from egm_lib.reports.readme import committed_readme, numbers, rewritten

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Paths of one machine
MACHINE = re.compile(rf"{re.escape(str(ROOT))}|/(?:home|root|Users|tmp)/|[A-Z]:\\")
MAX_LINES, MAX_BYTES = 15, 1_000_000  # larger ones open slowly on GitHub, or not at all


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_the_eight_stages_are_there():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"0{number}" for number in range(8)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert path.stat().st_size < MAX_BYTES
    assert "widgets" not in book.metadata and "papermill" not in book.metadata
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith(
        f"# {path.name[:2]} · "
    )
    for cell in code_cells(book):
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
        assert not MACHINE.search(cell.source)
        for output in cell.outputs:
            assert output.output_type != "error"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            data = output.get("data", {})
            for text in (
                output.get("text", ""),
                data.get("text/plain", ""),
                data.get("text/html", ""),
            ):
                assert not MACHINE.search(text)
    prose = [cell for cell in book.cells if cell.cell_type == "markdown"]
    assert len(prose) >= 0.6 * len(code_cells(book))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_literals(path):
    """papermill injects after this cell: a value computed in it would ignore what was asked for."""
    cells = code_cells(nbformat.read(path, as_version=4))
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(tagged[0].source).body
    }
    assert values == {"profile": "mini", "seed": 0}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_imported_exists(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("egm_lib"):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_readme_links_to_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    missing = [
        target
        for target in targets
        if not (ROOT / target).exists() and not target.startswith("figures/")
    ]
    assert missing == []
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in text


def test_the_readme_shows_the_committed_results():
    """Nothing is typed by hand: image and numbers are what figures/mini-full gives."""
    assert (ROOT / "README.md").read_text(encoding="utf-8") == committed_readme(ROOT)


def test_numbers_say_what_was_not_run():
    value = {"mean": 0.5, "ci95": [0.4, 0.6], "n": 10}
    summary = {"profile": "p", "seeds": [0, 1], "git": "abc"}
    summary |= {"acc_at_50": {"small-base": value}, "amodal_acc_at_50": {}}
    rows = {
        line.split("|")[3].strip(" `"): line
        for line in numbers(summary).splitlines()
        if line.startswith("|")
    }
    assert "| 50.0 [40.0, 60.0] | not run |" in rows["small-base"]
    assert rows["small-egm"].endswith("| not run | not run |")
    begin, end = "<!-- x: written by `python -m egm_lib.reports.readme` -->", "<!-- end of x -->"
    assert rewritten(f"a\n{begin}\nold\n{end}\nb", "x", "new") == f"a\n{begin}\nnew\n{end}\nb"
    with pytest.raises(ValueError, match="must have the marker"):
        rewritten("no markers", "x", "new")
