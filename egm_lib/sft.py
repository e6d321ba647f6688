"""Supervised fine-tuning on reasoning traces (Sec. 4.1), through TRL's SFTTrainer.

`python -m egm_lib.sft --profile mini --seed 0 --task vanilla` reads the run's traces and writes
`small-sft`.
`--control direct` writes `small-direct-control`: the base trained further on the same samples
without reasoning, for the minutes of SFT and GRPO together; `--control sft` writes
`small-sft-control`: SFT continued for GRPO's minutes.

The loss covers the assistant's answer and its end token only. With the vision frozen, pictures come
from the vision cache and prompts about one picture share its prefix; without, or on several
processes, TRL's plain forward is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer

from egm_lib.data import open_image, read_train, resolve_image
from egm_lib.profile import SFT, Profile, Run
from egm_lib.prompts import FAMILIES, Family
from egm_lib.shared_prefix import Reader, suffix_logps
from egm_lib.training import (
    Clock,
    TimedSchedule,
    TrainingError,
    chat_text,
    check_device,
    check_memory,
    common_options,
    freeze_tower,
    is_finished,
    load_start,
    logged_minutes,
    lora_config,
    require_checkpoint,
    require_file,
    stage_command,
    train_to,
    work_folder,
)
from egm_lib.vision_cache import freeze_vision

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
        # TRL's truncation could cut a picture's tokens apart: ours is in `answer_ids`
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
    require_file(path, "notebook 02 (vanilla) or 03 (amodal)")
    rows = [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    if not rows:
        raise TrainingError(f"{path} holds no trace: look at what the curation filters dropped.")
    if "gt_box" not in rows[0]:
        samples = {sample["sample_id"]: sample for sample in read_train(root, task)}
        rows = [{**samples[row["sample_id"]], **row} for row in rows if row["sample_id"] in samples]
    return rows


class PictureSampler(Sampler[int]):
    """Rows in random order, rows of one picture side by side (at most `together`), so that they
    share its prefix.
    """

    def __init__(self, pictures: list[str], together: int, seed: int):
        self.together, self.seed, self.epoch, self.size = together, seed, 0, len(pictures)
        codes_N = np.unique(np.asarray(pictures), return_inverse=True)[1]
        self.rows_by_picture = np.split(
            np.argsort(codes_N, kind="stable"), np.cumsum(np.bincount(codes_N))[:-1]
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        chunks = []
        for rows in self.rows_by_picture:
            rows = random.permutation(rows)
            chunks += [
                rows[start : start + self.together] for start in range(0, len(rows), self.together)
            ]
        for index in random.permutation(len(chunks)):
            yield from chunks[index].tolist()


def answer_ids(row: Mapping, tokenizer, asked: int, max_length: int | None) -> list[int]:
    """A row's answer and its end as tokens; cut where they and the `asked` ones before would pass
    max_length.

    Raises TrainingError where the question alone fills it.
    """
    ids = [
        *tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    if max_length is None:
        return ids
    if asked >= max_length:
        raise TrainingError(
            f"{row['image']}: picture and question take {asked} tokens, and sft.max_length is {max_length}: "
            "raise it, or lower the model's max_pixels."
        )
    return ids[: max_length - asked]


class SharedPrefixCollator:
    """Rows -> one batch: a prefix for each picture, and for each row its question and answer as a
    suffix of it.
    """

    def __init__(self, reader: Reader, processor, max_length: int | None):
        self.reader, self.processor, self.max_length = reader, processor, max_length

    def __call__(self, rows: list[dict]) -> dict:
        prefixes: dict[str, int] = {}
        prompts, group, suffixes, labels = [], [], [], []
        for row in rows:
            prompt = self.reader.prompt(
                Path(row["image"]), chat_text(self.processor, row["prompt"])
            )
            if row["image"] not in prefixes:
                prefixes[row["image"]] = len(prompts)
                prompts.append(prompt.upto_picture())
            group.append(prefixes[row["image"]])
            question = prompt.ids[prompt.picture_end :]
            answer = answer_ids(row, self.processor.tokenizer, len(prompt.ids), self.max_length)
            suffixes.append(torch.tensor([*question, *answer]))
            labels.append(torch.tensor([-100] * len(question) + answer))
        attend = [torch.ones_like(suffix) for suffix in suffixes]
        return {
            "prefixes": prompts,
            "group": torch.tensor(group),
            "suffix": pad_sequence(suffixes, batch_first=True),
            "attend": pad_sequence(attend, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


class PlainCollator:
    """Rows -> one batch as any model takes it: picture, question and answer in a row, padded on the
    right.
    """

    def __init__(self, processor, max_length: int | None):
        self.processor, self.max_length = processor, max_length

    def __call__(self, rows: list[dict]) -> dict:
        encoded, ids, labels, kinds = [], [], [], []
        for row in rows:
            text = chat_text(self.processor, row["prompt"])
            inputs = self.processor(
                images=[open_image(row["image"])], text=[text], return_tensors="pt"
            )
            question = inputs.pop("input_ids")[0].tolist()
            answer = answer_ids(row, self.processor.tokenizer, len(question), self.max_length)
            ids.append(torch.tensor([*question, *answer]))
            labels.append(torch.tensor([-100] * len(question) + answer))
            if "mm_token_type_ids" in inputs:
                kinds.append(
                    torch.tensor(inputs.pop("mm_token_type_ids")[0].tolist() + [0] * len(answer))
                )
            inputs.pop("attention_mask")
            encoded.append(inputs)
        batch = {key: torch.cat([inputs[key] for inputs in encoded]) for key in encoded[0]}
        batch |= {"mm_token_type_ids": pad_sequence(kinds, batch_first=True)} if kinds else {}
        return batch | {
            "input_ids": pad_sequence(
                ids, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id
            ),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


class SharedPrefixSFT(TimedSchedule, SFTTrainer):
    """SFTTrainer on SharedPrefixCollator's batches: the same loss, each picture read once a
    batch.
    """

    def __init__(self, *args, reader: Reader, clock: Clock, together: int, **kwargs):
        self.reader, self.clock, self.together = reader, clock, together
        super().__init__(*args, callbacks=[clock], **kwargs)
        # The loss is over the tokens of all accumulation steps
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> PictureSampler:
        return PictureSampler(
            list((train_dataset or self.train_dataset)["image"]), self.together, self.args.seed
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        features = self.reader.features([prefix.picture for prefix in inputs["prefixes"]])
        base = self.accelerator.unwrap_model(model)
        keep = inputs["labels"] != -100
        with self.accelerator.autocast():
            logps, _ = suffix_logps(
                getattr(base, "get_base_model", lambda: base)(),
                inputs["prefixes"],
                features,
                inputs["group"],
                inputs["suffix"],
                inputs["attend"],
                keep,
            )
        self._metrics["train"]["tokens"].append(float(keep.sum()))
        self._metrics["train"]["rows"].append(float(len(keep)))
        return -logps.sum() / (keep.sum() if num_items_in_batch is None else num_items_in_batch)


class PlainSFT(TimedSchedule, SFTTrainer):
    """TRL's SFTTrainer with our clock, on PlainCollator's batches."""

    def __init__(self, *args, clock: Clock, **kwargs):
        self.clock = clock
        super().__init__(*args, callbacks=[clock], **kwargs)


def make_trainer(
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
        # It drops the keys and values that rows of a picture share
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
    trainer = make_trainer(
        model, processor, rows, family, options, work=work_folder(out), log=log, seed=run.seed
    )
    return train_to(trainer, processor, out)


def dry_run(
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.sft", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--control", choices=("direct", "sft"))
    parser.add_argument(
        "--output", help="name of the model; small-sft or the control's name where it is not given"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved options as JSON")

    def act(run: Run, args: argparse.Namespace) -> object:
        if args.dry_run:
            return json.dumps(
                dry_run(run.profile, run.seed, args.task, args.control, args.output), indent=2
            )
        return run_sft(run, args.task, control=args.control, output=args.output)

    return stage_command(parser, argv, act)


if __name__ == "__main__":
    sys.exit(main())
