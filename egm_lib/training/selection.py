"""The selection of a run's RL data (Sec. 4.2, Table 7).

    python -m egm_lib.training.selection --profile mini --role learner      # then
    python -m egm_lib.training.selection --profile mini --role reference

Samples are kept that the SFT model misses and a stronger model solves, and as many easy ones. The
learner is the SFT model (Sec. 5.1), so SFT comes first. The learner answers before the reference,
which may answer the learner's misses alone (`selection.reference`). All amodal samples are kept
(Sec. 4.2).
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.data import read_samples, read_train, write_samples
from egm_lib.errors import InputError
from egm_lib.evaluation.scoring import load_predictions, score
from egm_lib.files import write_text
from egm_lib.inference.from_profile import make_engine, model_of
from egm_lib.inference.predict import predict
from egm_lib.inference.shards import WHOLE, Shard, add_shard_option
from egm_lib.learnability import select_learnable
from egm_lib.run import Run

ROLES = {"learner": "small-sft", "reference": "reference"}
AT_RANDOM = "rl_vanilla_unselected"  # the file of `select_at_random`, for `run.samples`


def pool_answers(run: Run, role: str) -> Path:
    """The file of a role's answers on the pool of vanilla samples."""
    return run.root / "selection" / f"{role}.jsonl"


def answer_pool(run: Run, role: str, shard: Shard = WHOLE) -> Path:
    """Lets a role answer the pool, or a shard of it, and continues where it stopped. Returns the
    file of answers.

    The learner answers every sample. The reference answers what `selection.reference` says: all
    samples, or the learner's misses. Raises InputError if the misses are not known yet.
    """
    data, name = run.profile.data, ROLES[role]
    pool = read_train(data.path, "vanilla", "selection", data.selection_limit)
    if role == "reference" and run.profile.selection.reference == "misses":
        learner = _scored(run, "learner")
        if learner["sample_id"].tolist() != list(pool["sample_id"]):
            raise InputError(
                "the reference answers the samples that the learner misses, and the learner has "
                "not answered the whole pool: run `python -m egm_lib.training.selection --role "
                "learner` first"
            )
        pool = pool.select(np.flatnonzero(_missed(learner)))
    checkpoint = model_of(run, name, "vanilla")
    with contextlib.closing(make_engine(run.profile, checkpoint, run.seed)) as engine:
        return predict(
            pool,
            engine,
            out=pool_answers(run, role),
            model=name,
            profile=run.profile.name,
            seed=run.seed,
            root=data.path,
            sampling=run.profile.generation.sampling,
            prompt=run.profile.grpo.prompt,
            shard=shard,
        )


def select(run: Run) -> dict:
    """Writes the RL samples of each task (samples/rl_<task>.jsonl) and selection.json.

    Returns the counts of selection.json:
    pool: all samples; kept: those that were selected;
    both, learnable, learner_only, neither: solved by both, by the reference alone, by the learner
    alone, by neither. both and learner_only are None if the reference answered the misses alone;
    easy: samples drawn from those that the learner solves;
    filled: samples added to reach the profile's `selection.fill_to`.
    Raises FileNotFoundError if one of the roles has not answered.
    """
    counts: dict[str, dict] = {}
    if "vanilla" in run.profile.tasks:
        counts["vanilla"] = _select_vanilla(run)
    if "amodal" in run.profile.tasks:
        kept = write_samples(run.samples("rl_amodal"), amodal_pool(run))
        counts["amodal"] = {"pool": kept, "kept": kept}
    write_text(run.root / "selection.json", json.dumps(counts, indent=1))
    return counts


def select_at_random(run: Run) -> int:
    """Writes as many random vanilla samples of the pool as `select` kept, and returns how many.

    They are what the selection is compared with.
    """
    data, kept = run.profile.data, len(read_samples(run.samples("rl_vanilla")))
    pool = read_train(data.path, "vanilla", "selection", data.selection_limit)
    drawn_N = np.random.default_rng(run.seed).choice(len(pool), min(kept, len(pool)), replace=False)
    return write_samples(run.samples(AT_RANDOM), pool.select(np.sort(drawn_N)))


def amodal_pool(run: Run):
    """The verified amodal samples of notebook 03, or else those of the data root."""
    verified, data = run.samples("selection_amodal"), run.profile.data
    if verified.exists():
        return read_samples(verified)
    return read_train(data.path, "amodal", "selection", data.selection_amodal_limit)


def _scored(run: Run, role: str) -> pd.DataFrame:
    return score(load_predictions(pool_answers(run, role)), run.profile.evaluation.rule)


def _missed(scored: pd.DataFrame) -> np.ndarray:
    """Rows with a wrong answer. An error of the engine is not a miss."""
    return (~scored["success"] & (scored["status"] != "error")).to_numpy(dtype=bool)


def _select_vanilla(run: Run) -> dict[str, int | None]:
    data, selection = run.profile.data, run.profile.selection
    learner, reference = (_scored(run, role) for role in ROLES)
    learner_N, ids = learner["success"].to_numpy(dtype=bool), learner["sample_id"].tolist()
    answered = reference["sample_id"].tolist()
    of_all = answered == ids
    if not of_all and answered != learner["sample_id"][_missed(learner)].tolist():
        raise InputError(
            "learner and reference answered different samples; delete the run's folder `selection`"
        )
    solved = set(reference["sample_id"][reference["success"]])
    solved -= set(learner["sample_id"][learner["status"] == "error"])  # not known to be a miss
    # A sample that the reference did not get counts as unsolved. The learner solves it.
    reference_N = np.array([sample_id in solved for sample_id in ids], dtype=bool)
    hard, easy = select_learnable(
        learner_N,
        reference_N,
        seed=run.seed,
        sample_ids=ids,
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
        "both": int((learner_N & reference_N).sum()) if of_all else None,
        "learnable": len(hard),
        "learner_only": int((learner_N & ~reference_N).sum()) if of_all else None,
        "neither": int((~learner_N & ~reference_N).sum()),
        "easy": len(easy),
        "filled": len(filled),
        "kept": kept,
    }


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("training.selection", "Answer the selection pool.")
    parser.add_argument("--role", choices=ROLES, required=True)
    add_shard_option(parser)
    args = parser.parse_args(argv)
    import torch  # only here: a notebook selects without it

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    return ends(lambda: print(answer_pool(run_of(args), args.role, args.shard)))


if __name__ == "__main__":
    sys.exit(main())
