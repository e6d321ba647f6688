"""python -m egm_lib.data fetch | prepare | check | stats: get real data, make a data root of it,
look at it.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

from egm_lib.data.fetch import SOURCES, FetchError, fetch
from egm_lib.data.prepare import prepare, report_path
from egm_lib.data.records import read_samples
from egm_lib.data.survey import describe, image_faults, table3
from egm_lib.errors import InputError

SHOWN_FAULTS = 20


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 fine, 1 something is wrong with the data, 2 wrong usage, 130
    interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m egm_lib.data", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    get = verbs.add_parser(
        "fetch", help="download and unpack (all by default); says what a person has to do"
    )
    get.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SOURCES))
    make = verbs.add_parser(
        "prepare", help="write train, selection and evaluation files; prints the counts"
    )
    make.add_argument(
        "--task", choices=("vanilla", "amodal"), action="append", help="default: both"
    )
    make.add_argument("--no-flips", action="store_true", help="without mirrored twins")
    make.add_argument(
        "--keep-leaks", action="store_true", help="keep training images of evaluation splits"
    )
    verbs.add_parser("check", help="does every image exist, with the stated size?")
    verbs.add_parser("stats", help="Table 3: ours beside the paper's")
    for verb in verbs.choices.values():
        verb.add_argument(
            "--root", type=Path, default=Path("data/raw/real"), help="data root (%(default)s)"
        )
    given = parser.parse_args(arguments)
    try:
        return _VERBS[given.verb](given)
    except (FetchError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _fetch(given: argparse.Namespace) -> int:
    if unknown := set(given.names) - set(SOURCES):
        raise InputError(f"nothing is called {min(unknown)!r}; there are {', '.join(SOURCES)}")
    failed = []
    for name in given.names or SOURCES:
        print(f"{name}: licence: {SOURCES[name].licence}")
        try:
            fetch(SOURCES[name], given.root)
        except FetchError as error:
            failed.append(str(error))
    for sentence in failed:
        print(sentence, file=sys.stderr)
    return 1 if failed else 0


def _prepare(given: argparse.Namespace) -> int:
    for task in given.task or ("vanilla", "amodal"):
        if (before := report_path(given.root, task)).exists():
            print(f"{task}: prepared before; delete {before} to do it again")
        report = prepare(
            given.root, tasks=[task], flips=not given.no_flips, keep_leaks=given.keep_leaks
        )[task]
        print(json.dumps(report, indent=1))
        verdict = (
            "as in the paper"
            if report["images"] == report["paper_images"]
            else "not the paper's number"
        )
        print(
            f"{task}: {report['images']:,} training images, paper {report['paper_images']:,}: "
            f"{verdict}"
        )
    return 0


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
    return 1 if wrong else 0


def _stats(given: argparse.Namespace) -> int:
    print(
        table3(
            {
                str(path.relative_to(given.root)): describe(read_samples(path))
                for path in _files(given.root)
            }
        )
    )
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
