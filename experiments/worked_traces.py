"""What is SFT worth on the worked traces alone? Exploratory, on validation scenes.

    python experiments/worked_traces.py train --seed 0
    python experiments/worked_traces.py report --seed 0 1 2

The varied teacher works 40 % of the expressions out. Where somebody can tell, the other traces can
be left out before SFT. This trains the small base of mini-full on what is then left, for as many
steps as its SFT had, and compares the answers with those of the runs' own models. It needs the
finished runs with their answers to the validation scenes. No test split is read.
"""

import argparse
from dataclasses import replace

import torch
from pilot import MINI_FULL, QWEN, Pilot, answer

from egm_lib.evaluation.results import Results
from egm_lib.evaluation.statistics import paired_difference
from egm_lib.files import read_jsonl
from egm_lib.mini.language import way_of
from egm_lib.run import Run
from egm_lib.sft import answer_rows, make_sft_trainer, read_traces
from egm_lib.training.checkpoints import is_finished, train_to, work_folder
from egm_lib.training.model_setup import load_start

STEPS = 5812  # of small-sft in mini-full: two passes over all traces
NAME = "small-sft-worked"


def is_useful(row: dict) -> bool:
    """Whether a trace works its expression out; a plain one needs no steps, but a place."""
    way = way_of(row["reasoning"], row["expression"])
    return way != "restating" if row["prompt_kind"] == "plain" else way == "worked"


def pilot(seed: int) -> Pilot:
    sft = replace(MINI_FULL.sft, num_train_epochs=100.0, max_steps=STEPS)
    return Pilot(replace(MINI_FULL, sft=sft), seed, f"worked-traces-{seed}")


def train(run: Pilot) -> None:
    out, options = run.checkpoint("vanilla", NAME), run.profile.sft
    if is_finished(out):
        return
    root = MINI_FULL.data.path
    traces = read_traces(Run(MINI_FULL, run.seed).traces("vanilla"), root, "vanilla")
    useful = [row for row in traces if is_useful(row)]
    print(f"{len(useful):,} of {len(traces):,} traces", flush=True)
    rows = answer_rows(
        useful, QWEN, root, reasoning=True, grid=options.answer_grid, label=options.answer_label
    )
    model, processor = load_start(
        MINI_FULL.models.small.location, MINI_FULL.models.small, "float32"
    )
    trainer = make_sft_trainer(
        model, processor, rows, QWEN, options, work=work_folder(out), log=run.log(f"{NAME}.jsonl"),
        seed=run.seed,
    )  # fmt: skip
    train_to(trainer, processor, out)


def report(seeds: list[int]) -> None:
    right = {}
    for seed in seeds:
        for row in read_jsonl(pilot(seed).root / "answers" / f"{NAME}-greedy.jsonl"):
            right[seed, row["sample_id"]] = row["right"]
    scored = Results([Run(MINI_FULL, seed).root for seed in seeds]).validation
    for model in ("small-sft", "small-sft-control", "small-egm"):
        theirs = scored[scored["model"] == model]
        keys = zip(theirs["seed"], theirs["sample_id"], strict=True)
        ours = theirs.assign(success=[right[key] for key in keys])
        difference = paired_difference(ours, theirs)
        values = (ours["success"].mean(), theirs["success"].mean(), difference.mean)
        worked, other, by, low, high = (100 * value for value in (*values, *difference.ci95))
        print(f"{NAME} {worked:.1f} %, {model} {other:.1f} %: {by:+.1f} [{low:.1f}, {high:.1f}]")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("act", choices=("train", "report"))
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    if args.act == "report":
        report(args.seed)
        return
    torch.set_num_threads(1)
    for seed in args.seed:
        run = pilot(seed)
        train(run)
        answer(run, NAME, str(run.checkpoint("vanilla", NAME)), count=1250)


if __name__ == "__main__":
    main()
