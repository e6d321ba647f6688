"""What a run's tables and figures are made from, in one small file.

    python -m egm_lib.pipeline.archive --profile mini-full
    python -m egm_lib.pipeline.archive --profile mini-full --restore

The file can be committed and restored. It holds predictions, judgements, latencies, logs and the
manifest: everything but checkpoints, ledgers and images. Curated data is large, so only its counts
(Table 3) and the traces of Fig. 3 are kept. To look at other traces, or to train on them, the run
must be made again.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
import tarfile
import tempfile
from pathlib import Path

from egm_lib.cli import ends, run_parser, runs_of
from egm_lib.data.fetch import unpack
from egm_lib.errors import InputError
from egm_lib.files import atomic_open, project_root
from egm_lib.pipeline.jobs import data_job
from egm_lib.reports.curated import SUMMARY
from egm_lib.reports.curated import summary as curated_summary
from egm_lib.run import Run

KEPT = (
    "manifest.json",
    "selection.json",
    "predictions",
    "validation",
    "failures",
    "latency",
    "logs",
    "groups",
    "ablations",
)


def archive_file(run: Run) -> Path:
    return project_root() / "results" / run.profile.name / f"seed-{run.seed}.tar.xz"


def pack(run: Run) -> Path:
    """Writes a run's archive, byte for byte the same from the same files; returns it."""
    places = [run.root / name for name in KEPT]
    files = [path for place in places for path in (place.rglob("*") if place.is_dir() else [place])]
    curated = curated_summary(run.root)
    out = archive_file(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_open(out, "wb") as file,
        tarfile.open(fileobj=file, mode="w:xz", preset=9) as archive,
    ):
        if curated:
            content = json.dumps(curated, ensure_ascii=False, indent=1).encode()
            member = tarfile.TarInfo(f"{run.root.name}/{SUMMARY}")
            member.size = len(content)
            archive.addfile(_anonymous(member), io.BytesIO(content))
        for path in sorted(files):
            if _is_kept(path.relative_to(run.root)) and path.is_file():
                archive.add(
                    path, f"{run.root.name}/{path.relative_to(run.root)}", filter=_anonymous
                )
    return out


def _is_kept(path: Path) -> bool:
    """Whether a file goes into an archive; the variants of ablations have checkpoints, too."""
    return path.suffix in (".json", ".jsonl") and "checkpoints" not in path.parts


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The member without owner, rights and time, which say nothing about the run."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def restore(run: Run) -> Path:
    """Restores a run's archived files, all or none; returns the run's folder.

    Raises FileExistsError if the run exists, and FetchError for an archive that is broken or has
    members outside the folder.
    """
    if run.root.exists():
        raise FileExistsError(
            f"{run.root} already exists; move it away before the archived run takes its place"
        )
    run.root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{run.root.name}.", dir=run.root.parent) as scratch:
        unpack(archive_file(run), Path(scratch))
        (Path(scratch) / run.root.name).rename(run.root)
    return run.root


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("pipeline.archive", __doc__.split("\n")[0], seed=False)
    parser.add_argument("--restore", action="store_true", help="from results/ to data/runs/")
    args = parser.parse_args(argv)
    return ends(lambda: _restore_all(runs_of(args)) if args.restore else _pack_all(runs_of(args)))


def _pack_all(runs: list[Run]) -> None:
    finished = [run for run in runs if run.manifest.is_file()]
    if not finished:
        raise _nothing(f"no run of {runs[0].profile.name} in data/runs", runs[0])
    for run in finished:
        print(pack(run))


def _restore_all(runs: list[Run]) -> None:
    packed = [run for run in runs if archive_file(run).is_file()]
    if not packed:
        raise _nothing(f"no archive in {archive_file(runs[0]).parent}", runs[0])
    for run in packed:
        print(restore(run))
    data = runs[0].profile.data.path
    if not data.exists():
        made_by = shlex.join([".venv/bin/python", *data_job(runs[0]).command[1:]])
        print(f"There are no images in {data}. `make figures` and `make gallery` need: {made_by}")


def _nothing(what: str, run: Run) -> InputError:
    return InputError(f"There is {what}; `make reproduce PROFILE={run.profile.name}` makes one.")


if __name__ == "__main__":
    sys.exit(main())
