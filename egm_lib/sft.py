"""Supervised fine-tuning on reasoning traces (Sec. 4.1), through TRL's SFTTrainer.

`python -m egm_lib.sft --profile mini --seed 0 --task vanilla` reads the run's traces and writes
`small-sft`.
`--control direct` writes `small-direct-control`: the base trained on the same samples without
reasoning, on as many tokens as SFT and GRPO together. `--control sft` writes `small-sft-control`:
SFT continued on as many tokens as GRPO sampled.

The loss covers the assistant's answer and its end token only. In one process and with all of the
vision frozen, each image is encoded once, and prompts about it share its prefix. Otherwise TRL's
plain forward is used.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from egm_lib.data import open_image, read_train, resolve_image
from egm_lib.files import read_jsonl
from egm_lib.inference.loading import limit_pixels, load_processor
from egm_lib.inference.shared_prefix import Reader
from egm_lib.inference.vision_cache import freeze_vision
from egm_lib.profile import SFT, Profile
from egm_lib.prompts import DEFAULT_PROMPT, FAMILIES, Family, quoted_tag
from egm_lib.run import Run
from egm_lib.training.checkpoints import (
    is_finished,
    require_checkpoint,
    require_file,
    train_to,
    work_folder,
)
from egm_lib.training.clock import Clock, logged_minutes, logged_tokens
from egm_lib.training.command import stage_command
from egm_lib.training.model_setup import (
    TrainingError,
    can_share_prefix,
    common_options,
    freeze_tower,
    load_start,
    lora_config,
    share_keys,
    use_one_gpu,
)
from egm_lib.training.preflight import check_device, check_memory
from egm_lib.training.sft_trainers import (
    PlainCollator,
    PlainSFT,
    SharedPrefixCollator,
    SharedPrefixSFT,
)

log = logging.getLogger(__name__)

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
    prompt: str = DEFAULT_PROMPT,
) -> Iterator[dict]:
    """TRL's prompt/completion rows of samples with traces; `image` is a file.

    reasoning False: the answer alone. grid, label: the profile's `sft.answer_grid` and
    `sft.answer_label`. prompt: the name of a prompt, the profile's `sft.prompt`.
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
                {
                    "role": "user",
                    "content": family.prompt(sample["expression"], sample["task"], name=prompt),
                }
            ],
            "completion": [{"role": "assistant", "content": text}],
            "image": str(resolve_image(sample, root)),
        }


def read_traces(path: Path, root: Path, task: str) -> list[dict]:
    """Samples with their `reasoning`.

    Rows that hold sample_id and reasoning alone are joined to the training samples; rows without
    both are left out, and so are those that no answer can be made of, as in `Family.answer`.
    """
    found = read_jsonl(require_file(path, "notebook 02 (vanilla) or 03 (amodal)"))
    rows = [row for row in found if _is_trace(row)]
    if len(rows) < len(found):
        log.warning("%s: %d rows are no traces and are left out", path, len(found) - len(rows))
    if not rows:
        raise TrainingError(f"{path} holds no trace: look at what the curation filters dropped.")
    if all("gt_box" in row for row in rows):
        return rows
    samples = {sample["sample_id"]: sample for sample in read_train(root, task)}
    joined = ({**samples.get(str(row["sample_id"]), {}), **row} for row in rows)
    return [row for row in joined if "gt_box" in row]


def _is_trace(row: Mapping) -> bool:
    """Whether a row has an id and words that an answer can hold."""
    reasoning, expression = row.get("reasoning"), row.get("expression", "")
    return (
        isinstance(row.get("sample_id"), str | int)
        and all(isinstance(text, str) and not quoted_tag(text) for text in (reasoning, expression))
        and bool(reasoning.strip())
    )


def sft_config(options: SFT, work: Path, seed: int) -> SFTConfig:
    """TRL's configuration of the stage.

    It comes before the model: DeepSpeed then divides the weights among the processes while they
    are loaded.
    """
    config = SFTConfig(**sft_options(options, work, seed))
    use_one_gpu(config)
    return config


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
    config: SFTConfig | None = None,
):
    """The trainer of the stage.

    rows: from `answer_rows`. shared_prefix: None shares the prefix if that is possible.
    config: from `sft_config`, if it was needed before the model.
    """
    dataset = Dataset.from_list(list(rows))
    config = config or sft_config(options, work, seed)
    clock = Clock(log, options.max_minutes, 60 * options.save_minutes)
    arguments = {
        "model": model,
        "args": config,
        "train_dataset": dataset,
        "processing_class": processor,
        "clock": clock,
        "peft_config": lora_config(options.lora),
    }
    if shared_prefix is None:
        shared_prefix = can_share_prefix(family, options, config)
    if shared_prefix:
        share_keys(config)
        reader = Reader(processor, model, freeze_vision(model), open_image)
        collator = SharedPrefixCollator(reader, processor, options.max_length)
        together = max(1, options.per_device_train_batch_size // 4)
        return SharedPrefixSFT(
            data_collator=collator, reader=reader, together=together, **arguments
        )
    freeze_tower(model, family, tower=options.freeze_vision, merger=options.freeze_merger)
    config.dataloader_num_workers = options.dataloader_num_workers
    return PlainSFT(data_collator=PlainCollator(processor, options.max_length), **arguments)


def preview_batch(run: Run, task: str, count: int = 2) -> tuple[dict, PreTrainedTokenizerBase]:
    """The first `count` traces of a run as a batch of the training, and the tokenizer to read it.

    Loads neither model nor trainer. `labels` is -100 wherever the loss does not look.
    """
    profile, options = run.profile, run.profile.sft
    small = profile.models.small
    processor = load_processor(small.location, small.family, small.max_pixels)
    limit_pixels(processor, small.family, options.max_pixels)
    traces = read_traces(run.traces(task), profile.data.path, task)[:count]
    rows = _answer_rows(traces, profile, reasoning=True)
    return PlainCollator(processor, options.max_length)(list(rows)), processor.tokenizer


def _answer_rows(traces: list[dict], profile: Profile, *, reasoning: bool) -> Iterator[dict]:
    options = profile.sft
    return answer_rows(
        traces,
        FAMILIES[profile.models.small.family],
        profile.data.path,
        reasoning=reasoning,
        grid=options.answer_grid,
        label=options.answer_label,
        prompt=options.prompt,
    )


# What a control is compared with: it trains on as many tokens, or for as many minutes
COMPARED = {"direct": ("sft", "grpo"), "sft": ("grpo",)}
MEASURED_ROWS = 256  # ours: enough for the mean length of a row within 2 %


def control_options(
    run: Run, task: str, control: str, rows: Sequence[Mapping], processor, processes: int = 1
) -> SFT:
    """The SFT options of a control, which gets the compute of what it is compared with.

    Its steps are as many as process the tokens in the logs of those stages; the sum is printed.
    If the profile limits SFT by minutes alone, or a log states no tokens, it takes their minutes.
    rows: from `answer_rows`. processor: the one that the training uses.
    """
    options = run.profile.sft
    logs = [run.log(f"{stage}-{task}.jsonl") for stage in COMPARED[control]]
    if (options.max_minutes and not options.max_steps) or None in map(logged_tokens, logs):
        minutes = sum(map(logged_minutes, logs))
        return replace(options, max_minutes=minutes, num_train_epochs=10_000.0)
    budgets = dict(zip(COMPARED[control], map(logged_tokens, logs), strict=True))
    batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * processes
    per_step = batch * mean_tokens(rows, PlainCollator(processor, options.max_length))
    steps = max(1, round(sum(budgets.values()) / per_step))
    stated = " + ".join(f"{tokens:,} of {stage}" for stage, tokens in budgets.items())
    print(f"{MODELS[control]}: {steps:,} steps x {per_step:,.0f} tokens, for {stated}")
    return replace(options, max_steps=steps, max_minutes=None)


def mean_tokens(rows: Sequence[Mapping], collator: PlainCollator) -> float:
    """Mean tokens of a row, image and question included; of MEASURED_ROWS evenly spaced ones."""
    measured = rows[:: -(-len(rows) // MEASURED_ROWS)]
    return sum(int(collator([row])["attention_mask"].sum()) for row in measured) / len(measured)


def run_sft(run: Run, task: str, *, control: str | None = None, output: str | None = None) -> Path:
    """Trains a run's SFT model, or one of its controls; returns its folder.

    A finished model is left as it is.
    """
    profile, name = run.profile, output or MODELS[control]
    out = run.checkpoint(task, name)
    if is_finished(out):
        return out
    small, family = profile.models.small, FAMILIES[profile.models.small.family]
    start = small.location
    if control == "sft":
        made_by = f"`python -m egm_lib.sft --task {task}`"
        start = str(require_checkpoint(run, task, MODELS[None], made_by))
    options, work = profile.sft, work_folder(out)
    check_device(options.dtype, "sft")
    check_memory(profile, "sft", start)
    traces = read_traces(run.traces(task), profile.data.path, task)
    rows = list(_answer_rows(traces, profile, reasoning=control != "direct"))
    if control:
        processor = load_processor(start, small.family, small.max_pixels)
        limit_pixels(processor, small.family, options.max_pixels)
        processes = int(os.environ.get("WORLD_SIZE", 1))
        options = control_options(run, task, control, rows, processor, processes)
    config = sft_config(options, work, run.seed)
    # Full training keeps float32 weights under autocast; with LoRA the frozen base may be small.
    model, processor = load_start(start, small, options.dtype if options.lora else "float32")
    limit_pixels(processor, small.family, options.max_pixels)
    stage = "sft" if control is None else f"sft-control-{control}"
    trainer = make_sft_trainer(
        model,
        processor,
        rows,
        family,
        options,
        work=work,
        log=run.log(f"{stage}-{task}.jsonl"),
        seed=run.seed,
        config=config,
    )
    # The start's processor as it was: limits of a profile are not stored in a checkpoint.
    return train_to(trainer, load_processor(start, small.family), out)


def sft_dry_run(
    profile: Profile, seed: int, task: str, control: str | None, output: str | None
) -> dict:
    """What would be trained, under TRL's own option names; loads no model."""
    run = Run(profile, seed)
    out = run.checkpoint(task, output or MODELS[control])
    stage = {
        "stage": "sft",
        "task": task,
        "control": control,
        "model": profile.models.small.path,
        "output": str(out),
        "traces": str(run.traces(task)),
        "max_minutes": profile.sft.max_minutes,
        "max_pixels": profile.sft.max_pixels,
        "freeze_vision": profile.sft.freeze_vision,
        "freeze_merger": profile.sft.freeze_merger,
    }
    return stage | sft_options(profile.sft, work_folder(out), seed)


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
