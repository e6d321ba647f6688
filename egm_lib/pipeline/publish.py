"""Publishing a run: its tables, figures and executed notebooks become those of the repository.

    python -m egm_lib.pipeline.publish --profile mini

A run writes into folders that git ignores. Only this command replaces what is committed.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import ValidationError

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.errors import EgmError
from egm_lib.files import atomic_open, project_root, read_json, write_text
from egm_lib.prompts import TASKS, Task
from egm_lib.reports import readme
from egm_lib.run import CARD, Run

NOTEBOOKS_OF = "mini"  # the profile whose outputs the stored notebooks show


class ReproduceError(EgmError, RuntimeError):
    """A run that cannot start or continue; the message is one clear sentence."""


def stages() -> list[Path]:
    """The notebooks in their order."""
    found = sorted((project_root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise ReproduceError(
            f"no notebooks in {project_root() / 'notebooks'}; run from a checkout of the repository"
        )
    return found


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook. Raises ReproduceError for a file that is none."""
    try:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
    except (ValueError, KeyError, AttributeError, TypeError, ValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ReproduceError(
            f"{path} is not a notebook ({reason}): restore it with `git checkout`, or delete it if "
            "a run made it"
        ) from error
    return book


def tasks_of(notebook: Path) -> Sequence[Task]:
    """The tasks that a notebook is for: those in its metadata, under egm.tasks, or else all.
    Raises ReproduceError for metadata of another shape.
    """
    ours = read_notebook(notebook).metadata.get("egm", {})
    tasks = ours.get("tasks", TASKS) if isinstance(ours, dict) else None
    if not isinstance(tasks, list | tuple) or not all(task in TASKS for task in tasks):
        raise ReproduceError(
            f'{notebook}: its metadata "egm" is {json.dumps(ours)}, not an object whose "tasks" '
            f"are a list of {', '.join(TASKS)}: put it back with `git checkout`"
        )
    return tasks


def clean(path: Path) -> None:
    """Strips what must not be stored from a notebook: widget state (its PNG stays), and the paths
    of this machine.
    """
    root = f"{project_root()}/"
    book = read_notebook(path)
    book.metadata.pop("widgets", None)
    book.metadata.pop("papermill", None)
    for cell in book.cells:
        cell.metadata.pop("papermill", None)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop("application/vnd.jupyter.widget-view+json", None)
            for holder, field in ((output, "text"), (data, "text/plain"), (data, "text/html")):
                if field in holder:
                    holder[field] = holder[field].replace(root, "")
    with atomic_open(path) as file:
        nbformat.write(book, file)


def publish(run: Run) -> None:
    """Puts the run's tables and figures into `figures/<profile>/`, with a card that says what made
    them; of the profile that the notebooks name, the executed notebooks as well.

    Raises ReproduceError if there is nothing to publish, and stores nothing then.
    """
    made, published = run.figures, run.published
    summary = made / "summary.json"
    if not summary.exists():
        raise ReproduceError(
            f"{summary} is missing: run `make reproduce PROFILE={run.profile.name}` first"
        )
    stated = read_json(summary, shape=dict)
    books = _executed_notebooks(run) if run.profile.name == NOTEBOOKS_OF else {}
    if made != published:
        copy = published.with_name(f"{published.name}.tmp")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(made, copy)
        if published.exists():  # not where an earlier publication was killed at this place
            shutil.rmtree(published)
        copy.rename(published)
    card = {name: stated.get(name) for name in ("profile", "seeds", "git", "hardware")}
    write_text(published / CARD, json.dumps(card, indent=1) + "\n")
    if run.profile.name in readme.PROFILES:
        readme.main()
    for notebook, book in books.items():
        with atomic_open(notebook) as file:
            nbformat.write(book, file)


def _executed_notebooks(run: Run) -> dict[Path, nbformat.NotebookNode]:
    """The stored notebooks with the outputs of the run, without papermill's cell and the times of
    cells. Raises ReproduceError if one was not run or was changed since.
    """
    books = {}
    for notebook in stages():
        executed = run.notebook(notebook.name)
        if not set(tasks_of(notebook)) & set(run.profile.tasks):
            continue
        if not executed.exists():
            raise ReproduceError(
                f"{executed} is missing: run the whole profile before its notebooks are published"
            )
        book = read_notebook(executed)
        book.cells = [
            cell
            for cell in book.cells
            if "injected-parameters" not in cell.metadata.get("tags", [])
        ]
        for cell in book.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if _worth_seeing(output)]
        if code_of(book) != code_of_file(notebook):
            raise ReproduceError(
                f"{notebook.name} was changed since it was run: run the profile again first"
            )
        books[notebook] = book
    return books


def _worth_seeing(output: nbformat.NotebookNode) -> bool:
    """Whether a page should show an output of a run: not the progress of jobs, nor bars, nor
    warnings.
    """
    if output.output_type != "stream":
        return (
            set(output.get("data", ())) != {"text/plain"} or output.output_type == "execute_result"
        )
    progress = re.compile(r"(?m)^[\w-]+: (started|(done in )?\d+ min \d\d s.*)$\n?")
    output.text = progress.sub("", output.text)
    return output.name == "stdout" and bool(output.text.strip())


def code_of_file(notebook: Path) -> list[str]:
    return code_of(read_notebook(notebook))


def code_of(book: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("pipeline.publish", "Make a run's results those of the repository.")
    args = parser.parse_args(argv)
    return ends(lambda: publish(run_of(args)))


if __name__ == "__main__":
    sys.exit(main())
