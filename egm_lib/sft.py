"""Supervised fine-tuning on reasoning traces (Sec. 4.1), through TRL's SFTTrainer.

`python -m egm_lib.sft --profile mini --seed 0 --task vanilla` reads the run's traces and writes
`small-sft`.
`--control direct` writes `small-direct-control`: the base trained further on the same samples
without reasoning, for the minutes of SFT and GRPO together; `--control sft` writes
`small-sft-control`: SFT continued for GRPO's minutes.

The loss covers the assistant's answer and its end token only. With the vision frozen, images come
from the vision cache and prompts about one image share its prefix; without, or on several
processes, TRL's plain forward is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig

from egm_lib.data import open_image, read_train, resolve_image
from egm_lib.files import read_jsonl
from egm_lib.inference.shared_prefix import Reader
from egm_lib.inference.vision_cache import freeze_vision
from egm_lib.profile import SFT, Profile
from egm_lib.prompts import FAMILIES, Family
from egm_lib.run import Run
from egm_lib.training.checkpoints import (
    is_finished,
    require_checkpoint,
    require_file,
    train_to,
    work_folder,
)
from egm_lib.training.clock import Clock, logged_minutes
from egm_lib.training.command import stage_command
from egm_lib.training.model_setup import (
    TrainingError,
    common_options,
    freeze_tower,
    load_start,
    lora_config,
)
from egm_lib.training.preflight import check_device, check_memory
from egm_lib.training.sft_trainers import (
    PlainCollator,
    PlainSFT,
    SharedPrefixCollator,
    SharedPrefixSFT,
)

MODELS = {None: "small-sft", "direct": "small-direct-control", "sft": "small-sft-control"}


def sft_options(options: SFT, work: Path, seed: int) -> dict:
    """A profile's `sft` section as TRL's SFTConfig takes it."""
    return common_options(work, seed, options.dtype) | {
        "num_train_epochs": options.num_train_epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.per_device_train_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.lr_scheduler_type,
        "warmup_steps": options.warmup_ratio,  # a number below 1 is a share of the steps
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        # TRL's truncation could cut an image's tokens apart: ours is in `answer_ids`
        "max_length": None,
        "packing": False,
    }


def answer_rows(
    samples: Iterable[Mapping],
    family: Family,
    root: Path,
    *,
    reasoning: bool,
    grid: int = 1,
    label: bool = True,
) -> Iterator[dict]:
    """TRL's prompt/completion rows of samples with traces; `image` is a file. reasoning False: the
    answer alone.

    grid, label: as the profile's `sft.answer_grid` and `sft.answer_label`.
    """
    for sample in samples:
        text = family.answer(
            sample["gt_box"],
            (sample["width"], sample["height"]),
            sample["expression"] if label else None,
            sample["reasoning"] if reasoning else None,
            grid=grid,
        )
        yield {
            "prompt": [
                {"role": "user", "content": family.prompt(sample["expression"], sample["task"])}
            ],
            "completion": [{"role": "assistant", "content": text}],
            "image": str(resolve_image(sample, root)),
        }


def read_traces(path: Path, root: Path, task: str) -> list[dict]:
    """Samples with their `reasoning`; rows of sample_id and reasoning alone are joined to the
    training samples.
    """
    rows = read_jsonl(require_file(path, "notebook 02 (vanilla) or 03 (amodal)"))
    if not rows:
        raise TrainingError(f"{path} holds no trace: look at what the curation filters dropped.")
    if "gt_box" not in rows[0]:
        samples = {sample["sample_id"]: sample for sample in read_train(root, task)}
        rows = [{**samples[row["sample_id"]], **row} for row in rows if row["sample_id"] in samples]
    return rows


def make_sft_trainer(
    model,
    processor,
    rows: Iterable[Mapping],
    family: Family,
    options: SFT,
    *,
    work: Path,
    log: Path,
    seed: int,
    shared_prefix: bool | None = None,
):
    """The trainer of a stage. rows: of `answer_rows`. shared_prefix None: where it is possible."""
    dataset = Dataset.from_list(list(rows))
    config = SFTConfig(**sft_options(options, work, seed))
    clock = Clock(log, options.max_minutes)
    arguments = {"model": model, "args": config, "processing_class": processor, "clock": clock}
    arguments |= {"peft_config": lora_config(options.lora)}
    possible = (
        family.name == "qwen3-vl"
        and options.freeze_vision
        and options.freeze_merger
        and config.world_size == 1
    )
    if possible if shared_prefix is None else shared_prefix:
        # It drops the keys and values that rows of an image share
        config.gradient_checkpointing = False
        reader = Reader(processor, model, freeze_vision(model), open_image)
        collator = SharedPrefixCollator(reader, processor, options.max_length)
        together = max(1, options.per_device_train_batch_size // 4)
        return SharedPrefixSFT(
            train_dataset=dataset,
            data_collator=collator,
            reader=reader,
            together=together,
            **arguments,
        )
    freeze_tower(model, family, tower=options.freeze_vision, merger=options.freeze_merger)
    collator = PlainCollator(processor, options.max_length)
    return PlainSFT(train_dataset=dataset, data_collator=collator, **arguments)


def minutes_for(run: Run, task: str, control: str | None) -> float | None:
    """A control trains as long as what it is compared with did, by the logs of those stages."""
    if control is None:
        return run.profile.sft.max_minutes
    stages = {"direct": ("sft", "grpo"), "sft": ("grpo",)}[control]
    return sum(logged_minutes(run.log(f"{stage}-{task}.jsonl")) for stage in stages)


def run_sft(run: Run, task: str, *, control: str | None = None, output: str | None = None) -> Path:
    """Trains a run's SFT model, or one of its controls; returns its folder. A finished one is left
    as it is.
    """
    profile, name = run.profile, output or MODELS[control]
    out = run.checkpoint(task, name)
    if is_finished(out):
        return out
    small, family = profile.models.small, FAMILIES[profile.models.small.family]
    start = small.location
    if control == "sft":
        start = str(
            require_checkpoint(run, task, MODELS[None], f"`python -m egm_lib.sft --task {task}`")
        )
    options = profile.sft
    check_device(options.dtype, "sft")
    check_memory(profile, "sft", start)
    traces = read_traces(run.traces(task), profile.data.path, task)
    if control:
        # Epochs without end: a control's budget is its minutes.
        steps = {"max_steps": options.max_steps, "num_train_epochs": options.num_train_epochs}
        if options.max_steps is None:
            steps = {"max_steps": None, "num_train_epochs": 10_000.0}
        options = replace(options, max_minutes=minutes_for(run, task, control), **steps)
    rows = answer_rows(
        traces,
        family,
        profile.data.path,
        reasoning=control != "direct",
        grid=options.answer_grid,
        label=options.answer_label,
    )
    # Full training keeps float32 weights under autocast; with LoRA the frozen base may be small.
    model, processor = load_start(start, small, options.dtype if options.lora else "float32")
    stage = "sft" if control is None else f"sft-control-{control}"
    log = run.log(f"{stage}-{task}.jsonl")
    trainer = make_sft_trainer(
        model, processor, rows, family, options, work=work_folder(out), log=log, seed=run.seed
    )
    return train_to(trainer, processor, out)


def sft_dry_run(
    profile: Profile, seed: int, task: str, control: str | None, output: str | None
) -> dict:
    """What would be trained, under TRL's own option names; loads no model."""
    run = Run(profile, seed)
    out = run.checkpoint(task, output or MODELS[control])
    own = {
        "stage": "sft",
        "task": task,
        "control": control,
        "model": profile.models.small.path,
        "output": str(out),
    }
    own |= {"traces": str(run.traces(task)), "max_minutes": profile.sft.max_minutes}
    own |= {"freeze_vision": profile.sft.freeze_vision, "freeze_merger": profile.sft.freeze_merger}
    return own | sft_options(profile.sft, work_folder(out), seed)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--control", choices=("direct", "sft"))
    parser.add_argument("--output", help="name of the model; default: small-sft, or the control's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved options as JSON")


def _train(run: Run, args: argparse.Namespace) -> object:
    if args.dry_run:
        return json.dumps(
            sft_dry_run(run.profile, run.seed, args.task, args.control, args.output), indent=2
        )
    return run_sft(run, args.task, control=args.control, output=args.output)


def main(argv: list[str] | None = None) -> int:
    return stage_command("sft", __doc__.split("\n")[0], argv, _train, add_options=_options)


if __name__ == "__main__":
    sys.exit(main())
