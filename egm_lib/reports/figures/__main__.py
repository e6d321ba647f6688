"""Command line of the figures; see `egm_lib.reports.figures`."""

import argparse
import sys

from egm_lib.cli import ends, run_parser, runs_of
from egm_lib.reports.figures import FIGURES, build_figures


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("reports.figures", "Redraw the figures of a profile.", seed=False)
    parser.add_argument(
        "--only", nargs="+", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES)
    )
    args = parser.parse_args(argv)
    return ends(lambda: _draw(args))


def _draw(args: argparse.Namespace) -> None:
    runs = runs_of(args)
    out_dir, rule = runs[0].figures, runs[0].profile.evaluation.rule
    for drawn in build_figures([run.root for run in runs], out_dir, rule=rule, only=args.only):
        result = f"not run: {drawn.not_run}" if drawn.not_run else f"{out_dir / drawn.name}.png"
        print(f"{drawn.name}: {result}")


if __name__ == "__main__":
    sys.exit(main())
