"""The whole paper in one command: papermill over the notebooks, in order, resumable.

    python -m egm_lib.pipeline.reproduce --profile mini

A stage is a notebook. It is skipped where it has run already with the same profile, the same
notebook and all its files still there; once a stage runs, all later ones do. Long work inside a
stage keeps its own checkpoints, so that a stopped stage continues. The manifest says what ran, with
which revisions, on which machine, for how long.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import papermill
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError

from egm_lib.cli import ends, run_parser
from egm_lib.curation.stages import BUDGET_VARIABLE, budget_of, estimate_run
from egm_lib.files import digest, project_root
from egm_lib.pipeline.jobs import without_gpus
from egm_lib.pipeline.manifest import (
    committed_json,
    environment,
    git_revision,
    open_manifest,
    write_manifest,
)
from egm_lib.pipeline.publish import ReproduceError, clean, code_of_file, publish, stages, tasks_of
from egm_lib.pipeline.verdict import verdict
from egm_lib.profile import load_profile
from egm_lib.reports.readme import numbers
from egm_lib.reports.tables import build_tables
from egm_lib.reports.tables.cells import read_summary
from egm_lib.run import Run

KERNEL = "python3"
ASKING = ("01", "02", "03")  # notebooks that ask judges and teachers
OUTPUTS = (  # folders that stages fill
    "samples",
    "curation",
    "traces",
    "failures",
    "selection",
    "checkpoints",
    "groups",
    "predictions",
    "latency",
)


def reproduce(run: Run, *, first: int = 0, last: int = 99, fresh: bool = False) -> None:
    """Runs the stages whose number lies between `first` and `last`. fresh: finished ones, too.

    Raises ReproduceError if another process works on the run, if the profile was changed
    since the run began, and if a notebook fails.
    """
    run.root.mkdir(parents=True, exist_ok=True)
    with _locked(run.root / ".lock"):
        manifest = open_manifest(run)
        notebooks, key, stale, agreed = stages(), run.profile.digest, fresh, False
        for number, notebook in enumerate(notebooks):
            name = notebook.stem
            key = digest([key, code_of_file(notebook)])[:16]
            if not first <= int(name[:2]) <= last:
                continue
            if not set(tasks_of(notebook)) & set(run.profile.tasks):
                print(f"[{number + 1}/{len(notebooks)}] {name}: not needed for {run.profile.name}")
                continue
            done = manifest["stages"].get(name, {})
            whole = done.get("key") == key and done.get("finished") and not _missing(run, done)
            prefix = f"[{number + 1}/{len(notebooks)}] {name}:"
            if whole and not stale:
                print(f"{prefix} done before ({done['seconds']:.0f} s)", flush=True)
                continue
            stale = True
            if name[:2] in ASKING and not agreed:
                agree_on_costs(run)
                agreed = True
            print(f"{prefix} running", flush=True)
            seconds = _run_stage(run, notebook, manifest, key)
            print(f"{prefix} finished in {seconds:.0f} s", flush=True)


def _run_stage(run: Run, notebook: Path, manifest: dict, key: str) -> float:
    """Executes a notebook and records it; returns its seconds.

    They add up over interrupted runs, whose long work is not done again.
    """
    name, executed = notebook.stem, run.notebook(notebook.name)
    executed.parent.mkdir(parents=True, exist_ok=True)
    old = manifest["stages"].get(name, {})
    files, began, finished = _files(run), time.monotonic(), False
    try:
        with without_gpus():
            _execute(notebook, executed, {"profile": run.profile.name, "seed": run.seed})
        finished = True
    finally:
        if executed.exists():
            clean(executed)
        seconds = old.get("seconds", 0.0) + time.monotonic() - began
        made = sorted(_files(run) - files | (set(old.get("files", [])) & _files(run)))
        manifest["stages"][name] = {
            "key": key,
            "finished": finished,
            "seconds": round(seconds, 1),
            "git": git_revision(),
            "files": made,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        manifest |= environment()  # of the stage that ran last
        manifest["wall_seconds"] = {
            stage: entry["seconds"] for stage, entry in manifest["stages"].items()
        }
        write_manifest(run, manifest)
    return seconds


def _execute(notebook: Path, executed: Path, parameters: dict) -> None:
    """Runs a notebook through papermill. Raises ReproduceError naming the cell and the reason."""
    # papermill fills {name} in its paths with parameters.
    source, target = (
        str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed)
    )
    again = f"The notebook as far as it ran: {executed}. The same command continues with it."
    try:
        papermill.execute_notebook(
            source,
            target,
            parameters,
            kernel_name=KERNEL,
            progress_bar=False,
            stdout_file=sys.stdout,
            cwd=str(notebook.parent),
            extra_arguments=["--IPKernelApp.log_level=50"],  # its warnings would bury our lines
        )
    except papermill.PapermillExecutionError as error:
        reason = str(error.evalue).strip() or error.ename
        raise ReproduceError(
            f"{notebook.stem} stopped in its cell {error.exec_count}: {reason}\n{again}"
        ) from None
    except DeadKernelError:
        raise ReproduceError(
            f"{notebook.stem}: its kernel died, most often because memory ran out. {again}"
        ) from None
    except NoSuchKernel as error:
        raise ReproduceError(
            f"There is no Jupyter kernel {error.name!r}; `make setup` installs ipykernel into "
            ".venv."
        ) from None
    except RuntimeError as error:  # jupyter_client's word for a kernel that cannot start
        raise ReproduceError(
            f"{notebook.stem}: its kernel cannot start: {error}. {again}"
        ) from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ReproduceError(
                f"another process is working on {path.parent}; wait for it, or stop it"
            ) from None
        yield


def _files(run: Run) -> set[str]:
    """What stages leave behind, relative to the project; images and unfinished work apart."""
    root = project_root()
    made = [
        path
        for folder in OUTPUTS
        for path in (run.root / folder).rglob("*")
        if ".unfinished" not in str(path)
    ]
    made += run.profile.data.path.rglob("*.jsonl")
    return {
        str(path.relative_to(root) if path.is_relative_to(root) else path)
        for path in made
        if path.is_file()
    }


def _missing(run: Run, done: dict) -> bool:
    return any(
        not (project_root() / name).exists() for name in [*done["files"], run.root / "notebooks"]
    )


def agree_on_costs(run: Run) -> None:
    """Says what the paid services of a run will cost, and asks for a budget where none is set.

    Raises ReproduceError if there is nobody to ask, or no budget is given.
    """
    estimate = estimate_run(run)
    if not estimate.stages:
        return
    print(f"Paid services, estimated:\n{estimate}", flush=True)
    if budget_of(run) is not None:
        print(
            f"Budget: {budget_of(run):g} USD. The asking stops before it is exceeded.", flush=True
        )
        return
    advice = f"set a budget in USD: make reproduce PROFILE={run.profile.name} BUDGET=100"
    if not sys.stdin.isatty():
        raise ReproduceError(f"This run asks paid services; {advice}")
    answer = input("How many USD may be spent (empty: stop)? ").strip()
    if not answer:
        raise ReproduceError(f"Nothing was asked. To continue, {advice}")
    os.environ[BUDGET_VARIABLE] = answer
    budget_of(run)  # raises where the answer is no amount


def _show_results(run: Run) -> None:
    """The paper beside ours, the committed results beside ours, and where to look further.

    The tables are made again, since the manifest is complete only now.
    """
    committed = committed_json(f"figures/{run.profile.name}/summary.json")  # also after --publish
    evaluation = run.profile.evaluation
    build_tables(run.roots, run.figures, rule=evaluation.rule, draws=evaluation.bootstrap_samples)
    summary = read_summary(run.figures / "summary.json")
    print(f"\nAccuracy at IoU > 0.5, mean over splits, 95 % intervals\n\n{numbers(summary)}\n")
    print((run.figures / "table4_differences.md").read_text(encoding="utf-8"))
    print(f"Does it reproduce the committed results?\n\n{verdict(summary, committed)}\n")
    print(f"Tables and figures: {run.figures}")
    gallery = run.figures / "gallery.html"
    print(f"Gallery: {gallery}" if gallery.exists() else "Gallery: not made")


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("pipeline.reproduce", "Run the notebooks of a profile.", seed=False)
    parser.add_argument(
        "--seed", type=int, action="append", help="default: every seed of the profile"
    )
    number = {"type": int, "metavar": "NN"}
    parser.add_argument("--first", default=0, help="number of the first notebook", **number)
    parser.add_argument("--last", default=99, help="number of the last notebook", **number)
    parser.add_argument("--fresh", action="store_true", help="run notebooks that are done, too")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="make tables, figures and executed notebooks those of the repository",
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    return ends(lambda: _reproduce_all(args))


def _reproduce_all(args: argparse.Namespace) -> None:
    profile = load_profile(args.profile)
    seeds = args.seed or profile.seeds
    for seed in seeds:
        run = Run(profile, seed)
        print(f"{profile.title}: profile {profile.name}, seed {seed} -> {run.root}", flush=True)
        reproduce(run, first=args.first, last=args.last, fresh=args.fresh)
    _show_results(run)
    if args.publish:
        publish(Run(profile, seeds[0]))


if __name__ == "__main__":
    sys.exit(main())
