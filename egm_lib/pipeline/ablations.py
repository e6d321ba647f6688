"""Ablations that the paper lacks: parts of the training left out, and other ways to decode.

    python -m egm_lib.pipeline.ablations --profile mini [--seed 0] [--steps 40]

They need a finished run. Each variant of the training is a short GRPO run of the same number of
steps: another weight of the reward, no KL, SFT or GRPO alone. It is stored in a folder below the
run, and answers one validation split (ablation_grpo.md). `small-egm` also answers the test splits
with less reasoning, by sampling and by a vote (table4_decoding.md; egm_lib.inference.decoding).
Finished parts are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.data import read_validation
from egm_lib.grpo import run_grpo
from egm_lib.inference.from_profile import make_engine
from egm_lib.inference.predict import predict
from egm_lib.inference.shards import WHOLE, Shard, add_shard_option
from egm_lib.pipeline.jobs import prediction_jobs, run_jobs, shard_jobs, training_job
from egm_lib.profile import Model
from egm_lib.reports.tables import build_tables
from egm_lib.run import Run
from egm_lib.training.checkpoints import require_checkpoint, require_file
from egm_lib.training.command import whole_training
from egm_lib.training.variants import DECODINGS, STEPS, TASK, VARIANTS


@dataclass(frozen=True)
class VariantRun(Run):
    """A run below another one, which trains a variant of its model on its samples.

    Checkpoint, log and answers are stored separately.
    """

    origin: Run
    name: str
    start: Path

    @property
    def root(self) -> Path:
        return self.origin.root / "ablations" / f"{self.profile.grpo.max_steps}-steps" / self.name

    def samples(self, name: str) -> Path:
        return self.origin.samples(name)

    def checkpoint(self, task: str, model: str) -> Path:
        return self.start if model == "small-sft" else super().checkpoint(task, model)


def variant_run(run: Run, name: str, steps: int) -> VariantRun:
    """The run of a variant; all have the same steps, whatever limits the profile sets."""
    variant, profile = VARIANTS[name], run.profile
    grpo = replace(profile.grpo, max_steps=steps, max_minutes=None, **(variant.changes or {}))
    start = (
        run.checkpoint(TASK, "small-sft")
        if variant.start == "small-sft"
        else _folder(profile.models.small)
    )
    return VariantRun(replace(profile, grpo=grpo), run.seed, run, name, start)


def _folder(model: Model) -> Path:
    """A checkpoint as a folder; one on the hub is fetched first."""
    if Path(model.location).is_dir():
        return Path(model.location)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.path, revision=model.revision))


def answers_file(run: Run, name: str, steps: int) -> Path:
    return run.root / "ablations" / f"{steps}-steps" / "answers" / f"{name}.jsonl"


def train(run: Run, name: str, steps: int) -> Path:
    """The variant's checkpoint, trained by `egm_lib.grpo` where it is not finished."""

    return run_grpo(variant_run(run, name, steps), TASK)


def answer(run: Run, steps: int, shard: Shard = WHOLE) -> None:
    """Every variant's answers to the validation split, or to a shard of it."""

    small, samples = run.profile.models.small, read_validation(run.profile.data.path)
    for name, variant in VARIANTS.items():
        trained = variant_run(run, name, steps)
        folder = trained.start if variant.changes is None else trained.checkpoint(TASK, "small-egm")
        model = replace(small, path=str(folder), revision=None)
        # Closed before the next one is built
        with contextlib.closing(make_engine(run.profile, model, run.seed)) as engine:
            predict(
                samples,
                engine,
                out=answers_file(run, name, steps),
                model=name,
                profile=run.profile.name,
                seed=run.seed,
                root=run.profile.data.path,
                sampling=run.profile.generation.sampling,
                prompt=run.profile.evaluation.prompt,
                shard=shard,
            )


def run_all(run: Run, steps: int) -> None:
    """Trains and evaluates what is missing, in separate processes, and writes the tables."""

    require_checkpoint(run, TASK, "small-sft", f"`make reproduce PROFILE={run.profile.name}`")
    require_file(run.samples(f"rl_{TASK}"), "notebook 05")
    trained = [name for name, variant in VARIANTS.items() if variant.changes is not None]
    run_jobs(
        run,
        [
            training_job(run, "pipeline.ablations", "--steps", str(steps), "--train", name)
            for name in trained
        ],
    )
    answering = ("pipeline.ablations", "--steps", str(steps), "--answer")
    run_jobs(run, shard_jobs(run, ["small-egm"], *answering))
    decoded = [f"small-egm@{way}" for way in DECODINGS]
    run_jobs(run, prediction_jobs(run, decoded, "--task", TASK))
    evaluation, names = run.profile.evaluation, ["ablation_grpo", "table4_decoding"]
    build_tables(
        run.roots, run.figures, rule=evaluation.rule, draws=evaluation.bootstrap_samples, only=names
    )
    for name in names:
        print((run.figures / f"{name}.md").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("pipeline.ablations", __doc__.split("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of each variant (default: %(default)s)"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--train", choices=VARIANTS, metavar="VARIANT", help="train this variant only"
    )
    part.add_argument("--answer", action="store_true", help="only let the trained variants answer")
    add_shard_option(parser)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    return ends(lambda: _work(args))


def _work(args: argparse.Namespace) -> None:
    run = run_of(args)
    if args.train:
        print(whole_training(lambda: train(run, args.train, args.steps), args.profile))
    elif args.answer:
        answer(run, args.steps, args.shard)
    else:
        run_all(run, args.steps)


if __name__ == "__main__":
    sys.exit(main())
