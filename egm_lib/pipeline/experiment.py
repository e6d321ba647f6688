"""The registered experiment of docs/protocol.md: when does GRPO pay?

    python -m egm_lib.pipeline.experiment [--seed 0 ...]

For each seed it runs `mini-full` (the varied teacher) and `mini-uniform`, then what only the
experiment asks for: GRPO on prompts drawn at random, sampled answers, and answers to the validation
scenes. It can be stopped and continued. Its answers stand in hypotheses.md, table4_samples.md and
table4_validation.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from egm_lib.cli import ends
from egm_lib.pipeline.jobs import job, run_jobs, training_job
from egm_lib.pipeline.reproduce import reproduce
from egm_lib.profile import load_profile
from egm_lib.reports.figures import build_figures
from egm_lib.reports.tables import build_tables
from egm_lib.reports.tables.evidence import PAIR
from egm_lib.run import Run
from egm_lib.training.selection import AT_RANDOM, ROLES, select_at_random

UNSELECTED = "small-egm-unselected"
SAMPLES = 8  # the protocol's pass@8
SAMPLED = ("small-sft", "small-egm")


def train_unselected(run: Run) -> None:
    """GRPO as in the run itself, on prompts that were not selected (Sec. 4.2 tested)."""
    if not run.samples(AT_RANDOM).exists():
        select_at_random(run)
    names = ("--output", UNSELECTED, "--prompts", AT_RANDOM)
    run_jobs(run, [training_job(run, "grpo", "--task", "vanilla", *names)])
    answers = ("--task", "vanilla", "--model", UNSELECTED)
    run_jobs(run, [job(run, "inference.predict", *answers)])


def sample(run: Run) -> None:
    """SAMPLES sampled answers of the model before and after GRPO, on every test split."""
    models = [f"{model}@sample-{n}" for model in SAMPLED for n in range(1, SAMPLES + 1)]
    run_jobs(run, [job(run, "inference.predict", "--model", model) for model in models])


def validate(run: Run, *more: str) -> None:
    """Answers to the validation scenes: greedy and sampled of the model before and after GRPO,
    greedy of the SFT control and of the selection's reference. more: further models.
    """
    sampled = [f"{model}@sample-1" for model in SAMPLED]
    models = [*SAMPLED, "small-sft-control", *more, ROLES["reference"], *sampled]
    answers = ("inference.predict", "--validation", "--model")
    run_jobs(run, [job(run, *answers, model) for model in models])


def run_experiment(seed: int) -> None:
    """Everything that the protocol asks of one seed."""
    varied, uniform = (Run(load_profile(PAIR[name]), seed) for name in ("varied", "uniform"))
    reproduce(varied)
    train_unselected(varied)
    sample(varied)
    validate(varied, UNSELECTED)
    reproduce(uniform)
    sample(uniform)
    validate(uniform)


def report(runs: Sequence[Run]) -> None:
    """The tables and figures of a profile's runs, and the answer to every hypothesis."""
    run = runs[0]
    roots = sorted({root for each in runs for root in each.roots})
    evaluation = run.profile.evaluation
    build_tables(roots, run.figures, rule=evaluation.rule, draws=evaluation.bootstrap_samples)
    build_figures(roots, run.figures, rule=evaluation.rule)
    if (run.figures / "hypotheses.md").exists():
        print((run.figures / "hypotheses.md").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.pipeline.experiment",
        description="Run the registered experiment of docs/protocol.md.",
    )
    parser.add_argument("--seed", type=int, action="append", help="default: those of mini-full")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    return ends(lambda: _run_all(args.seed))


def _run_all(seeds: list[int] | None) -> None:
    profile = load_profile(PAIR["varied"])
    for seed in seeds or profile.seeds:
        run_experiment(seed)
    for name in PAIR.values():
        report([Run(load_profile(name), seed) for seed in seeds or profile.seeds])


if __name__ == "__main__":
    sys.exit(main())
