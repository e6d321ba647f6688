"""Command line of the tables; see `egm_lib.reports.tables`."""

import argparse
import sys

from egm_lib.cli import ends, run_parser, runs_of
from egm_lib.parsing import RULES
from egm_lib.reports.tables import TABLES, build_tables


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("reports.tables", "Rebuild the tables of a profile.", seed=False)
    parser.add_argument(
        "--rule",
        choices=RULES,
        help="default: the profile's; another rule writes to a subfolder of that name",
    )
    parser.add_argument(
        "--only", action="append", choices=TABLES, help="e.g. table4; may be given several times"
    )
    args = parser.parse_args(argv)
    return ends(lambda: _write(args))


def _write(args: argparse.Namespace) -> None:
    runs = runs_of(args)
    evaluation, out_dir = runs[0].profile.evaluation, runs[0].figures
    rule = args.rule or evaluation.rule
    if rule != evaluation.rule:
        out_dir /= rule
    roots, draws = [run.root for run in runs], evaluation.bootstrap_samples
    tables = build_tables(roots, out_dir, rule=rule, draws=draws, only=args.only)
    not_run = [name for name, table in tables.items() if not table.was_run]
    print(f"{len(tables) - len(not_run)} tables -> {out_dir}")
    if not_run:
        print(f"not run: {', '.join(not_run)}")
    for name in args.only or ():
        print((out_dir / f"{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
