"""The whole paper in one command: papermill over the notebooks, in order, resumable.

    python -m egm_lib.reproduce --profile mini

A stage is a notebook. It is skipped where it has run already with the same profile, the same
notebook and all its files still there; once a stage runs, all later ones do. Long work inside a
stage keeps its own checkpoints, so that a stage that was stopped goes on. The manifest says what
ran, with which revisions, on what, for how long.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import papermill

from egm_lib.data.records import atomic_open
from egm_lib.profile import ProfileError, Run, load_profile, project_root
from egm_lib.readme import numbers
from egm_lib.tables import build_tables

KERNEL = "python3"
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "vllm",
    "deepspeed",
    "numpy",
    "papermill",
)
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


class ReproduceError(RuntimeError):
    """A run that cannot start or go on; the message is one clear sentence."""


def stages() -> list[Path]:
    """The notebooks in their order."""
    found = sorted((project_root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise ReproduceError(
            f"no notebooks in {project_root() / 'notebooks'}; run from a checkout of the repository"
        )
    return found


def reproduce(run: Run, *, first: str = "00", last: str = "99", fresh: bool = False) -> None:
    """Runs the stages whose number lies between `first` and `last`. fresh: even those that are
    done.

    Raises ReproduceError where another process works on the run, where the profile was changed
    since it began, and where a notebook fails.
    """
    run.root.mkdir(parents=True, exist_ok=True)
    with _locked(run.root / ".lock"):
        manifest = _open_manifest(run)
        notebooks, key, stale = stages(), run.profile.digest, fresh
        for number, notebook in enumerate(notebooks):
            name = notebook.stem
            key = _digest([key, _sources(notebook)])
            if not first[:2] <= name[:2] <= last[:2]:
                continue
            done = manifest["stages"].get(name, {})
            say = f"[{number + 1}/{len(notebooks)}] {name}:"
            if (
                not stale
                and done.get("key") == key
                and done.get("finished")
                and not _missing(run, done)
            ):
                print(f"{say} done before ({done['seconds']:.0f} s)", flush=True)
                continue
            stale = True
            print(f"{say} running", flush=True)
            seconds = _run_stage(run, notebook, manifest, key)
            print(f"{say} finished in {seconds:.0f} s", flush=True)


def _run_stage(run: Run, notebook: Path, manifest: dict, key: str) -> float:
    """Executes a notebook and records it; the seconds of all sittings count: their long work is not
    done again.
    """
    name, executed = notebook.stem, run.notebook(notebook.name)
    executed.parent.mkdir(parents=True, exist_ok=True)
    old = manifest["stages"].get(name, {})
    files, began, finished = _files(run), time.monotonic(), False
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            {"profile": run.profile.name, "seed": run.seed},
            kernel_name=KERNEL,
            progress_bar=False,
            stdout_file=sys.stdout,
            cwd=str(notebook.parent),
            extra_arguments=["--IPKernelApp.log_level=50"],  # its warnings would bury our lines
        )
        finished = True
    except papermill.PapermillExecutionError as error:
        reason = str(error.evalue).strip() or error.ename
        raise ReproduceError(
            f"{name} stopped in its cell {error.exec_count}: {reason}\n"
            f"What it had shown until then: {executed}. Mend the cause; the same command goes on with this notebook."
        ) from None
    finally:
        if executed.exists():
            clean(executed)
        seconds = old.get("seconds", 0.0) + time.monotonic() - began
        made = sorted(_files(run) - files | (set(old.get("files", [])) & _files(run)))
        manifest["stages"][name] = {
            "key": key,
            "finished": finished,
            "seconds": round(seconds, 1),
            "git": _git(),
            "files": made,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        manifest |= _where()  # of the stage that ran last
        manifest["wall_seconds"] = {
            stage: entry["seconds"] for stage, entry in manifest["stages"].items()
        }
        _write_manifest(run, manifest)
    return seconds


def clean(path: Path) -> None:
    """Strips what must not be stored from a notebook: widget state (its PNG stays), and the paths
    of this machine.
    """
    root = f"{project_root()}/"
    book = nbformat.read(path, as_version=4)
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
    """Puts the run's executed notebooks in the place of the stored ones, with outputs but without
    papermill's cell and the times of cells. All of them, or none: ReproduceError where one was not
    run or was changed since."""
    books = {}
    for notebook in stages():
        executed = run.notebook(notebook.name)
        if not executed.exists():
            raise ReproduceError(
                f"{executed} is missing: run the whole profile before its notebooks are published"
            )
        book = nbformat.read(executed, as_version=4)
        book.cells = [
            cell
            for cell in book.cells
            if "injected-parameters" not in cell.metadata.get("tags", [])
        ]
        for cell in book.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if _worth_seeing(output)]
        if _code(book) != _sources(notebook):
            raise ReproduceError(
                f"{notebook.name} was changed since it was run: run the profile again first"
            )
        books[notebook] = book
    for notebook, book in books.items():
        with atomic_open(notebook) as file:
            nbformat.write(book, file)


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
    """What stages leave behind, relative to the project; pictures and unfinished work apart."""
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


def _sources(notebook: Path) -> list[str]:
    return _code(nbformat.read(notebook, as_version=4))


def _code(book: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _open_manifest(run: Run) -> dict:
    """The run's manifest, new or as it was left; profile and base models must be those that the run
    began with.
    """
    values = json.loads(json.dumps(run.profile.as_dict()))
    manifest = {
        "profile": run.profile.name,
        "seed": run.seed,
        "values": values,
        "models": _model_revisions(run),
    }
    manifest |= {"stages": {}, "wall_seconds": {}}
    if run.manifest.exists():
        now = manifest
        try:
            manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            raise ReproduceError(
                f"{run.manifest} is not JSON; delete it, and the run goes on with its files"
            ) from None
        changed = [
            text for key in ("values", "models") for text in _changes(manifest[key], now[key], key)
        ]
        if changed:
            raise ReproduceError(
                f"{run.root} was begun with another profile or other base models: {'; '.join(changed)}. Delete that "
                "folder to begin anew, or put them back."
            )
    else:
        manifest |= _where()
    _write_manifest(run, manifest)
    return manifest


def _where() -> dict:
    """By which revision, with what and on what a stage runs."""
    return {"git": _git(), "versions": _versions(), "hardware": _hardware()}


def _changes(old: object, new: object, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            text
            for key in keys
            for text in _changes(old.get(key), new.get(key), f"{where}.{key}".strip("."))
        ]
    return [] if old == new else [f"{where} was {old!r}, is {new!r}"]


def _write_manifest(run: Run, manifest: dict) -> None:
    data = sorted(run.profile.data.path.rglob("*.jsonl"))
    manifest["data"] = {
        "root": run.profile.data.root,
        "files": {path.name: _file_digest(path) for path in data},
    }
    with atomic_open(run.manifest) as file:
        json.dump(manifest, file, indent=1)


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _model_revisions(run: Run) -> dict[str, str | None]:
    """Of a local checkpoint the digest of its weights, of a hub id its revision (None: the
    newest).
    """
    models = run.profile.models
    named = {"small": models.small, "large": models.large, "reference": models.reference}
    return {
        name: _weights_digest(Path(model.location)) or model.revision
        for name, model in named.items()
    }


def _weights_digest(folder: Path) -> str | None:
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return _digest([_file_digest(path) for path in files]) if files else None


def _git() -> str:
    """The revision of the checkout, "-dirty" where it has changes, figures apart: runs write them;
    or "unknown".
    """
    git = ["git", "-C", str(project_root())]
    try:
        revision = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        same = (
            subprocess.run(
                [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)figures"]
            ).returncode
            == 0
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision.stdout.strip() + ("" if same else "-dirty")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _hardware() -> dict[str, object]:
    import torch

    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_gb, 1),
        "gpus": gpus,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _show_results(run: Run) -> None:
    """The paper beside ours, and where to look further; tables anew, since the manifest is complete
    only now.
    """
    evaluation = run.profile.evaluation
    build_tables(run.roots, run.figures, rule=evaluation.rule, draws=evaluation.bootstrap_samples)
    summary = json.loads((run.figures / "summary.json").read_text(encoding="utf-8"))
    print(f"\nAccuracy at IoU > 0.5, mean over splits, 95 % intervals\n\n{numbers(summary)}\n")
    print((run.figures / "table4_differences.md").read_text(encoding="utf-8"))
    print(f"Tables and figures: {run.figures}")
    gallery = run.figures / "gallery.html"
    print(f"Gallery: {gallery}" if gallery.exists() else "Gallery: not made")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.reproduce", description="Run the notebooks of a profile."
    )
    parser.add_argument("--profile", default="mini")
    parser.add_argument(
        "--seed", type=int, action="append", help="default: every seed of the profile"
    )
    parser.add_argument("--first", default="00", metavar="NN", help="number of the first notebook")
    parser.add_argument("--last", default="99", metavar="NN", help="number of the last notebook")
    parser.add_argument("--fresh", action="store_true", help="run notebooks that are done, too")
    parser.add_argument(
        "--publish", action="store_true", help="store the executed notebooks, with their outputs"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    try:
        profile = load_profile(args.profile)
        for seed in args.seed or profile.seeds:
            run = Run(profile, seed)
            print(f"{profile.title}: profile {profile.name}, seed {seed} -> {run.root}", flush=True)
            reproduce(run, first=args.first, last=args.last, fresh=args.fresh)
        if args.publish:
            publish(Run(profile, (args.seed or profile.seeds)[0]))
    except (ProfileError, ReproduceError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"\n{error}; what is finished is kept, the same command goes on from there.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(
            "\nStopped; what is finished is kept, the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    _show_results(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
