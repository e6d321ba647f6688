"""python -m egm_lib.reports.efficiency"""

import argparse
import sys

from egm_lib.cli import ends
from egm_lib.reports.efficiency import FIGURES, OUT, TABLES, build_efficiency


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.reports.efficiency",
        description="Fig. 5 under several protocols, the roofline, and the planner.",
    )
    parser.add_argument("--gpu", default="L20", help="the planner's device; default: L20")
    names = list(dict.fromkeys([*TABLES, *FIGURES]))
    parser.add_argument("--only", action="append", default=[], choices=names, metavar="NAME")
    args = parser.parse_args(argv)
    return ends(lambda: _build(args))


def _build(args: argparse.Namespace) -> None:
    written = build_efficiency(gpu=args.gpu, only=args.only)
    print(f"{OUT}: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(main())
