"""What every command line shares: the profile and seed options, and how a command ends.

Exit status: 0 if the work is done; 2, with one sentence on stderr, if there is something for the
user to mend; 130 if the command was interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from egm_lib.errors import EgmError
from egm_lib.profile import load_profile
from egm_lib.run import Run


def run_parser(module: str, description: str, *, seed: bool = True) -> argparse.ArgumentParser:
    """A parser of `python -m egm_lib.<module>` with --profile and, unless seed is False, --seed."""
    parser = argparse.ArgumentParser(prog=f"python -m egm_lib.{module}", description=description)
    parser.add_argument("--profile", default="mini", help="default: %(default)s")
    if seed:
        parser.add_argument("--seed", type=int, help="default: the profile's first")
    return parser


def run_of(args: argparse.Namespace) -> Run:
    """The run that --profile and --seed name."""
    profile = load_profile(args.profile)
    return Run(profile, profile.seeds[0] if args.seed is None else args.seed)


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The runs of all seeds of the profile that --profile names."""
    profile = load_profile(args.profile)
    return [Run(profile, seed) for seed in profile.seeds]


def ends(work: Callable[[], int | None]) -> int:
    """Does a command's work and returns its exit status: what the work returns, or 0."""
    try:
        return work() or 0
    except (EgmError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command continues from here.", file=sys.stderr)
        return 130
