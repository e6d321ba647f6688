"""The RL data of a run (Sec. 4.2, Table 7): what the SFT model misses and a stronger one solves,
and as many easy ones.

    python -m egm_lib.training.selection --profile mini --role learner
    python -m egm_lib.training.selection --profile mini --role reference    # the stronger model's

The learner is the SFT model (Sec. 5.1), so SFT comes first. All amodal samples are kept (Sec. 4.2).
"""

import json
import os
import sys
from pathlib import Path

import torch

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.data import read_samples, read_train, write_samples
from egm_lib.errors import InputError
from egm_lib.evaluation.scoring import load_predictions, score
from egm_lib.files import write_text
from egm_lib.inference.from_profile import make_engine, model_of
from egm_lib.inference.predict import predict
from egm_lib.learnability import select_learnable
from egm_lib.run import Run

ROLES = {"learner": "small-sft", "reference": "reference"}


def pool_answers(run: Run, role: str) -> Path:
    """Where a role's answers on the pool of vanilla samples stand."""
    return run.root / "selection" / f"{role}.jsonl"


def answer_pool(run: Run, role: str) -> Path:
    """Has a role answer every sample of the pool; goes on where it stopped."""
    data, name = run.profile.data, ROLES[role]
    engine = make_engine(run.profile, model_of(run, name, "vanilla"), run.seed)
    return predict(
        read_train(data.path, "vanilla", "selection", data.selection_limit),
        engine,
        out=pool_answers(run, role),
        model=name,
        profile=run.profile.name,
        seed=run.seed,
        root=data.path,
        sampling=run.profile.generation.sampling,
    )


def select(run: Run) -> dict:
    """Writes the RL samples of each task (samples/rl_<task>.jsonl) and selection.json; returns what
    that holds.

    Counts: pool, both (solve it), learnable (the reference alone), learner_only, neither, easy
    (drawn), filled (up to the profile's `selection.fill_to`), kept.
    Raises FileNotFoundError before both roles have answered.
    """
    counts: dict[str, dict] = {}
    if "vanilla" in run.profile.tasks:
        counts["vanilla"] = _select_vanilla(run)
    if "amodal" in run.profile.tasks:
        kept = write_samples(run.samples("rl_amodal"), amodal_pool(run))
        counts["amodal"] = {"pool": kept, "kept": kept}
    write_text(run.root / "selection.json", json.dumps(counts, indent=1))
    return counts


def amodal_pool(run: Run):
    """The verified amodal samples of notebook 03, where it has made them; else those of the data
    root.
    """
    verified, data = run.samples("selection_amodal"), run.profile.data
    if verified.exists():
        return read_samples(verified)
    return read_train(data.path, "amodal", "selection", data.selection_amodal_limit)


def _select_vanilla(run: Run) -> dict[str, int]:
    data, selection, rule = run.profile.data, run.profile.selection, run.profile.evaluation.rule
    learner, reference = (score(load_predictions(pool_answers(run, role)), rule) for role in ROLES)
    if learner["sample_id"].tolist() != reference["sample_id"].tolist():
        raise InputError(
            "learner and reference answered different samples; delete the run's folder `selection`"
        )
    learner_N, reference_N = learner["success"].to_numpy(), reference["success"].to_numpy()
    hard, easy = select_learnable(
        learner_N,
        reference_N,
        seed=run.seed,
        sample_ids=learner["sample_id"].tolist(),
        easy=selection.easy,
        learner_iou_N=learner["iou"].to_numpy(),
    )
    easy = easy if selection.num_easy == "equal" else easy[:0]
    chosen = {*hard.tolist(), *easy.tolist()}
    others = [row for row in range(len(learner_N)) if row not in chosen]
    filled = others[: max(0, selection.fill_to - len(chosen))]
    pool = read_train(data.path, "vanilla", "selection", data.selection_limit)
    kept = write_samples(run.samples("rl_vanilla"), pool.select(sorted([*chosen, *filled])))
    return {
        "pool": len(learner_N),
        "both": int((learner_N & reference_N).sum()),
        "learnable": len(hard),
        "learner_only": int((learner_N & ~reference_N).sum()),
        "neither": int((~learner_N & ~reference_N).sum()),
        "easy": len(easy),
        "filled": len(filled),
        "kept": kept,
    }


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("training.selection", "Answer the selection pool.")
    parser.add_argument("--role", choices=ROLES, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    return ends(lambda: print(answer_pool(run_of(args), args.role)))


if __name__ == "__main__":
    sys.exit(main())
