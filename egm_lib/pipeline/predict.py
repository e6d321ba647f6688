"""Predictions of models by as many processes as this machine has room for.

    python -m egm_lib.pipeline.predict --profile eval-egm-8b --model small-egm

Further options go to every process (egm_lib.inference.predict).
"""

import sys

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.pipeline.jobs import prediction_jobs, run_jobs
from egm_lib.run import Run


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("pipeline.predict", "Predict evaluation splits in several processes.")
    parser.add_argument("--model", required=True, action="append", help="may be given again")
    args, others = parser.parse_known_args(argv)
    return ends(lambda: _predict(run_of(args), args.model, others))


def _predict(run: Run, models: list[str], options: list[str]) -> None:
    run_jobs(run, prediction_jobs(run, models, *options))


if __name__ == "__main__":
    sys.exit(main())
