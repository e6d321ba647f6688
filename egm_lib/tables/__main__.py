"""Command line of the tables; see `egm_lib.tables`."""

import argparse
import sys

from egm_lib.parsing import RULES
from egm_lib.profile import ProfileError, Run, load_profile
from egm_lib.tables import TABLES, build_tables


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.tables", description="Rebuild the tables of a profile."
    )
    parser.add_argument("--profile", default="mini")
    parser.add_argument(
        "--rule",
        choices=RULES,
        help="default: the profile's; another rule writes to figures/<profile>/<rule>",
    )
    parser.add_argument(
        "--only", action="append", choices=TABLES, help="e.g. table4; may be given several times"
    )
    args = parser.parse_args(argv)
    try:
        profile = load_profile(args.profile)
        rule = args.rule or profile.evaluation.rule
        runs = [Run(profile, seed) for seed in profile.seeds]
        out_dir = runs[0].figures if rule == profile.evaluation.rule else runs[0].figures / rule
        draws = profile.evaluation.bootstrap_samples
        tables = build_tables(
            [run.root for run in runs], out_dir, rule=rule, draws=draws, only=args.only
        )
    except (ProfileError, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(tables)} tables -> {out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
