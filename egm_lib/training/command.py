"""How a training starts from the command line, and how it ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.run import Run
from egm_lib.training import plan, ranks
from egm_lib.training.model_setup import TrainingError


def stage_command(
    module: str,
    description: str,
    argv: list[str] | None,
    act: Callable[[Run, argparse.Namespace], object],
    *,
    add_options: Callable[[argparse.ArgumentParser], object] | None = None,
) -> int:
    """Runs `python -m egm_lib.<module>`; prints what act(run, args) returns.

    Adds --profile, --seed, --task and --plan to what add_options adds. Returns the exit status.
    """
    parser = run_parser(module, description)
    parser.add_argument("--task", choices=("vanilla", "amodal"), default="vanilla")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print the memory, disk and hours that it needs (egm_lib.training.plan)",
    )
    if add_options is not None:
        add_options(parser)
    args = parser.parse_args(argv)
    if args.plan:
        return plan.main(["--profile", args.profile, "--task", args.task])
    return ends(lambda: print(whole_training(lambda: act(run_of(args), args), args.profile)))


def whole_training(train: Callable[[], object], profile: str) -> object:
    """What train() returns; the processes of the training then end together.

    profile: the one to look at where a GPU has too little memory. Raises TrainingError then.
    """
    try:
        result = train()
        ranks.leave()
        return result
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"The GPU has too little memory: {str(error).splitlines()[0]} Make "
            "per_device_train_batch_size smaller, train with lora, or take more GPUs. "
            f"`python -m egm_lib.training.plan --profile {profile}` says what it needs."
        ) from error
