"""Where does GRPO gain? Exploratory, after the results of the registered experiment were known.

    python experiments/where_grpo_gains.py

Compares models on the prompts where the answer of `small-sft` was worked, concluding or restating;
on those that both of two models worked out; and the two teachers' models with each other. It needs
the runs of mini-full and mini-uniform: `make restore PROFILE=mini-full`, and the same for
mini-uniform.
"""

import pandas as pd

from egm_lib.evaluation.results import Results
from egm_lib.evaluation.statistics import Difference, paired_difference
from egm_lib.profile import load_profile
from egm_lib.reports.tables.evidence import PAIR, ways_told
from egm_lib.run import Run

ROW = ["seed", "sample_id"]


def results_of(teacher: str) -> Results:
    profile = load_profile(PAIR[teacher])
    return Results([Run(profile, seed).root for seed in profile.seeds])


def stated(difference: Difference) -> str:
    low, high = difference.ci95
    return f"{100 * difference.mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}], n = {difference.n:,}"


def by_way(results: Results, task: str) -> None:
    before = results.of("small-sft", task)
    told = ways_told(before)
    for way, prompts in told.groupby("way"):
        print(f"{task}, small-sft was {way}:")
        for model in ("small-egm", "small-sft-control"):
            pair = [rows.merge(prompts[ROW], on=ROW) for rows in (results.of(model, task), before)]
            after_before = " after {:.1f} %, before {:.1f} %,".format(
                *(100 * rows["success"].mean() for rows in pair)
            )
            print(f"  {model}{after_before} {stated(paired_difference(*pair))}")


def both_worked(results: Results, task: str) -> None:
    worked = {}
    for model in ("small-sft", "small-egm", "small-sft-control"):
        told = ways_told(results.of(model, task))
        worked[model] = told[told["way"] == "worked"]
    print(f"{task}, both worked:")
    for a, b in (("small-sft-control", "small-sft"), ("small-egm", "small-sft-control")):
        shared = worked[a][ROW].merge(worked[b][ROW], on=ROW)
        pair = [worked[model].merge(shared, on=ROW) for model in (a, b)]
        print(f"  {a} - {b}: {stated(paired_difference(*pair))}")


def across_teachers(varied: pd.DataFrame, uniform: pd.DataFrame) -> str:
    return stated(paired_difference(varied, uniform, over_splits=True))


def main() -> None:
    varied, uniform = results_of("varied"), results_of("uniform")
    for task in ("vanilla", "amodal"):
        by_way(varied, task)
        both_worked(varied, task)
    worked_sft = uniform.of("small-sft", "vanilla")
    for model in ("small-sft", "small-egm"):
        difference = across_teachers(varied.of(model, "vanilla"), worked_sft)
        print(f"{model} of the varied teacher - small-sft of the uniform one: {difference}")


if __name__ == "__main__":
    main()
