"""What a run's tables and figures are made from, as one small file that can be committed and put
back.

    python -m egm_lib.archive --profile mini-full            # data/runs/mini-full-* -> figures/mini-full/seed-*.tar.xz
    python -m egm_lib.archive --profile mini-full --restore  # and back: then `make tables PROFILE=mini-full`

Predictions, judgements, latencies, logs, manifest: all but checkpoints, ledgers and pictures.
Curated data, of which Table 3 is made, is large and counted for the first seed only; so it is kept
of that one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tarfile
import tempfile
from pathlib import Path

from egm_lib.data.fetch import FetchError, unpack
from egm_lib.data.records import atomic_open
from egm_lib.jobs import data_job
from egm_lib.profile import ProfileError, Run, load_profile

KEPT = (
    "manifest.json",
    "selection.json",
    "predictions",
    "failures",
    "latency",
    "logs",
    "groups",
    "ablations",
)
KEPT_OF_FIRST = ("curation", "traces")


def archive_file(run: Run) -> Path:
    return run.figures / f"seed-{run.seed}.tar.xz"


def pack(run: Run) -> Path:
    """Writes a run's archive, byte for byte the same from the same files; returns it."""
    first = run.seed == run.profile.seeds[0]
    places = [run.root / name for name in (*KEPT, *(KEPT_OF_FIRST if first else ()))]
    files = [path for place in places for path in (place.rglob("*") if place.is_dir() else [place])]
    out = archive_file(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_open(out, "wb") as file,
        tarfile.open(fileobj=file, mode="w:xz", preset=9) as archive,
    ):
        for path in sorted(files):
            if path.is_file() and path.suffix in (".json", ".jsonl") and ".ledger" not in path.name:
                archive.add(
                    path, f"{run.root.name}/{path.relative_to(run.root)}", filter=_anonymous
                )
    return out


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner, rights and time, which say nothing about the run."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def restore(run: Run) -> Path:
    """Puts a run's archived files back where they were, all or none; returns the folder.

    Raises FileExistsError where the run is there already, FetchError for an archive that is broken
    or reaches outside.
    """
    if run.root.exists():
        raise FileExistsError(
            f"{run.root} is there already; move it away before the archived run takes its place"
        )
    run.root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{run.root.name}.", dir=run.root.parent) as scratch:
        unpack(archive_file(run), Path(scratch))
        (Path(scratch) / run.root.name).rename(run.root)
    return run.root


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.archive", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--profile", default="mini")
    parser.add_argument(
        "--restore", action="store_true", help="from figures/PROFILE back to data/runs"
    )
    args = parser.parse_args(argv)
    try:
        profile = load_profile(args.profile)
        runs = [Run(profile, seed) for seed in profile.seeds]
        there = [
            run
            for run in runs
            if (archive_file(run).is_file() if args.restore else run.manifest.is_file())
        ]
        if not there:
            what = (
                f"no archive in {runs[0].figures}"
                if args.restore
                else f"no run of {profile.name} in data/runs"
            )
            raise FileNotFoundError(f"{what}; `make reproduce PROFILE={profile.name}` makes one")
        for run in there:
            print(restore(run) if args.restore else pack(run))
        if args.restore and not profile.data.path.exists():
            made_by = shlex.join([".venv/bin/python", *data_job(runs[0]).command[1:]])
            print(
                f"No pictures in {profile.data.path}: before `make figures` or `make gallery`, {made_by}"
            )
    except (ProfileError, OSError, FetchError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
