"""EGM taken apart, as the paper does not do: the reward's weight, the KL, SFT and GRPO alone; other
ways to decode.

    python -m egm_lib.ablations --profile mini [--seed 0] [--steps 40]

Needs a finished run. Each variant of the training is a short GRPO run of the same number of steps
in a folder of its own below the run, and answers one validation split (ablation_grpo.md).
`small-egm` answers the test splits with less reasoning, by sampling and by a vote
(table4_decoding.md; egm_lib.decoding). What is finished is not run again.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from egm_lib.profile import Model, Profile, ProfileError, Run, load_profile

TASK = "vanilla"
STEPS = 40  # ours: enough for the curves of the miniature to part
# Ours; majority-1: one sample
DECODINGS = ("budget-8", "budget-16", "budget-24", "majority-1", "majority-8")


@dataclass(frozen=True)
class Variant:
    """start: the model that is trained, small-base or small-sft; changes: of the profile's `grpo`,
    None: no GRPO.
    """

    start: str
    changes: Mapping[str, float] | None = field(default_factory=dict)


VARIANTS = {
    "base": Variant("small-base", None),
    "sft": Variant("small-sft", None),
    "grpo": Variant("small-base"),
    "sft-and-grpo": Variant("small-sft"),  # as in the paper: reward weight 0.5, with KL
    **{
        f"reward-weight-{weight:g}": Variant("small-sft", {"reward_weight": weight})
        for weight in (0, 0.25, 0.75, 1)
    },
    "without-kl": Variant("small-sft", {"beta": 0.0}),
}


@dataclass(frozen=True)
class VariantRun(Run):
    """A run below another: trains a model of it on its samples, and keeps its own checkpoint, log
    and answers.
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


def validation_samples(profile: Profile):
    """validation.jsonl of the data root where there is one (no table tests on it), else RefCOCO's
    val.
    """
    from egm_lib.data import read_eval, read_samples

    path = profile.data.path / "validation.jsonl"
    return read_samples(path) if path.is_file() else read_eval(profile.data.path, "refcoco", "val")


def train(run: Run, name: str, steps: int) -> Path:
    """The variant's checkpoint, trained by `egm_lib.grpo` where it is not finished."""
    from egm_lib.grpo import run_grpo

    return run_grpo(variant_run(run, name, steps), TASK)


def answer(run: Run, steps: int) -> None:
    """Every variant's answers to the validation split."""
    from egm_lib.generate import make_engine, predict

    small, samples = run.profile.models.small, validation_samples(run.profile)
    for name, variant in VARIANTS.items():
        own = variant_run(run, name, steps)
        folder = own.start if variant.changes is None else own.checkpoint(TASK, "small-egm")
        engine = make_engine(run.profile, replace(small, path=str(folder), revision=None), run.seed)
        predict(
            samples,
            engine,
            out=answers_file(run, name, steps),
            model=name,
            profile=run.profile.name,
            seed=run.seed,
            root=run.profile.data.path,
            sampling=run.profile.generation.sampling,
        )


def run_all(run: Run, steps: int) -> None:
    """Trains and asks what is missing, in processes of their own, and writes the table."""
    from egm_lib.jobs import job, run_jobs, training_job
    from egm_lib.tables import build_tables
    from egm_lib.training import require_checkpoint, require_file

    require_checkpoint(run, TASK, "small-sft", f"`make reproduce PROFILE={run.profile.name}`")
    require_file(run.samples(f"rl_{TASK}"), "notebook 05")
    trained = [name for name, variant in VARIANTS.items() if variant.changes is not None]
    run_jobs(
        run,
        [
            training_job(run, "ablations", "--steps", str(steps), "--train", name)
            for name in trained
        ],
    )
    run_jobs(run, [job(run, "ablations", "--steps", str(steps), "--answer")])
    run_jobs(
        run,
        [job(run, "generate", "--task", TASK, "--model", f"small-egm@{way}") for way in DECODINGS],
    )
    evaluation, names = run.profile.evaluation, ["ablation_grpo", "table4_decoding"]
    build_tables(
        run.roots, run.figures, rule=evaluation.rule, draws=evaluation.bootstrap_samples, only=names
    )
    for name in names:
        print((run.figures / f"{name}.md").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    from egm_lib.generate import EngineFailure
    from egm_lib.jobs import JobFailed
    from egm_lib.training import TrainingError

    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.ablations", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--seed", type=int, help="default: the profile's first")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of each variant (default: %(default)s)"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--train", choices=VARIANTS, metavar="VARIANT", help="train this variant only"
    )
    part.add_argument("--answer", action="store_true", help="only let the trained variants answer")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    try:
        profile = load_profile(args.profile)
        run = Run(profile, profile.seeds[0] if args.seed is None else args.seed)
        if args.train:
            print(train(run, args.train, args.steps))
        elif args.answer:
            answer(run, args.steps)
        else:
            run_all(run, args.steps)
    except (
        ProfileError,
        TrainingError,
        JobFailed,
        EngineFailure,
        FileNotFoundError,
        ValueError,
    ) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
