"""Real data: python -m egm_lib.data fetch | prepare | check | stats.

fetch downloads what may be downloaded, prepare makes a data root of it, check compares images with
what samples state, and stats prints Table 3.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

from egm_lib.cli import ends
from egm_lib.data.fetch import SOURCES, FetchError, fetch
from egm_lib.data.prepare import prepare, report_path
from egm_lib.data.records import read_samples
from egm_lib.data.survey import describe, image_faults, table3
from egm_lib.errors import InputError

SHOWN_FAULTS = 20


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status, as `cli.ends` does. Images that `check` finds wrong also give 2."""
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    get = verbs.add_parser("fetch", help="download and unpack; print what a person has to do")
    get.add_argument(
        "names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(SOURCES)}"
    )
    make = verbs.add_parser(
        "prepare", help="write train, selection and evaluation files; print the counts"
    )
    make.add_argument(
        "--task", choices=("vanilla", "amodal"), action="append", help="default: both"
    )
    make.add_argument("--no-flips", action="store_true", help="add no mirrored twins")
    make.add_argument(
        "--keep-leaks", action="store_true", help="keep training images of evaluation splits"
    )
    verbs.add_parser("check", help="is every image there, with the stated size?")
    verbs.add_parser("stats", help="Table 3: ours beside the paper's")
    for verb in verbs.choices.values():
        verb.add_argument(
            "--root", type=Path, default=Path("data/raw/real"), help="data root (%(default)s)"
        )
    given = parser.parse_args(arguments)
    return ends(lambda: _VERBS[given.verb](given))


def _fetch(given: argparse.Namespace) -> int:
    if unknown := set(given.names) - set(SOURCES):
        raise InputError(f"there is no source {min(unknown)!r}; there are {', '.join(SOURCES)}")
    failures = {}
    for name in given.names or SOURCES:
        print(f"{name}: licence: {SOURCES[name].licence}")
        try:
            fetch(SOURCES[name], given.root)
        except (FetchError, OSError) as error:  # the other sources are fetched all the same
            failures[name] = error
    for name, error in failures.items():
        optional = " (not needed: amodal training data can do without)" * SOURCES[name].optional
        print(f"{error}{optional}", file=sys.stderr)
    return 2 if any(not SOURCES[name].optional for name in failures) else 0


def _prepare(given: argparse.Namespace) -> int:
    failures = []
    for task in given.task or ("vanilla", "amodal"):
        if (before := report_path(given.root, task)).exists():
            print(f"{task}: already prepared; delete {before} to prepare it again")
        try:
            reports = prepare(
                given.root, tasks=[task], flips=not given.no_flips, keep_leaks=given.keep_leaks
            )
        except FileNotFoundError as error:  # the other task may have its files
            failures.append(f"{task} is not prepared: {error}")
            continue
        report = reports[task]
        print(json.dumps(report, indent=1))
        same = report["images"] == report["paper_images"]
        verdict = "as in the paper" if same else "not the paper's number"
        print(
            f"{task}: {report['images']:,} training images, paper {report['paper_images']:,}: "
            f"{verdict}"
        )
    for sentence in failures:
        print(sentence, file=sys.stderr)
    return 2 if failures else 0


def _check(given: argparse.Namespace) -> int:
    wrong = 0
    for path in _files(given.root):
        faults = image_faults(read_samples(path), given.root)
        shown = list(islice(faults, SHOWN_FAULTS))
        more = sum(1 for _ in faults)
        wrong += len(shown) + more
        print(f"{path}: {len(shown) + more or 'no'} image(s) missing or other than stated")
        for line in [*shown, *([f"and {more} more"] if more else [])]:
            print(f"  {line}")
    return 2 if wrong else 0


def _stats(given: argparse.Namespace) -> int:
    described = {
        str(path.relative_to(given.root)): describe(read_samples(path))
        for path in _files(given.root)
    }
    print(table3(described))
    return 0


def _files(root: Path) -> list[Path]:
    """Every sample file of a data root, training first."""
    files = [
        path
        for pattern in ("train*.jsonl", "selection*.jsonl", "eval/*.jsonl")
        for path in sorted(root.glob(pattern))
    ]
    if not files:
        raise FileNotFoundError(f"no train*.jsonl or eval/*.jsonl in {root}; `prepare` makes them")
    return files


_VERBS = {"fetch": _fetch, "prepare": _prepare, "check": _check, "stats": _stats}

if __name__ == "__main__":
    sys.exit(main())
