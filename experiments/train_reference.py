"""SFT of the large base on worked traces: the project's trainer, with validation beside it.

    python experiments/train_reference.py --data data/raw/reference --out data/runs/reference \\
        --steps 12500 --minutes 98 --rate 1.5e-3 --every 1250

Every `--every` steps the model answers `--validate` samples of validation.jsonl greedily; the
accuracy goes to validation.jsonl in the output folder. No test split is read. Traces are what the
teacher writes, its planted errors left out.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainerCallback

from egm_lib.boxes import iou
from egm_lib.data import open_image, resolve_image
from egm_lib.files import read_jsonl
from egm_lib.inference.engine import Request
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.parsing import parse_completion
from egm_lib.profile import load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.sft import answer_rows, make_sft_trainer
from egm_lib.training.checkpoints import train_to, work_folder
from egm_lib.training.model_setup import load_start

MINI_FULL = load_profile("mini-full")


def traces(root: Path, limit: int) -> list[dict]:
    """The samples of root's train.jsonl, each with its true reasoning."""
    truths = read_jsonl(root / "teacher-train.jsonl")
    reasoning = {truth["sample_id"]: truth["reasoning"] for truth in truths}
    samples = read_jsonl(root / "train.jsonl")
    rows = [{**sample, "reasoning": reasoning[sample["sample_id"]]} for sample in samples]
    return rows[:limit]


@torch.no_grad()
def accuracy(model, processor, samples: list[dict], root: Path) -> float:
    """Share of greedy answers with IoU > 0.5 (the profile's rule)."""
    family = FAMILIES["qwen3-vl"]
    engine = TransformersEngine(
        model, "qwen3-vl", batch_size=64, processor=processor, cache_vision=False
    )
    requests = [
        Request(open_image(resolve_image(s, root)), family.prompt(s["expression"], s["task"]))
        for s in samples
    ]
    right = 0
    sampling = replace(MINI_FULL.generation.sampling, max_new_tokens=100)
    for sample, answer in zip(samples, engine.answer(requests, sampling), strict=True):
        parsed = parse_completion(
            answer.raw_answer, frame=family.frame, image_wh=(sample["width"], sample["height"])
        )
        right += parsed.box is not None and iou(parsed.box, sample["gt_box"]) > 0.5
    return right / len(samples)


class Validate(TrainerCallback):
    def __init__(self, every: int, samples: list[dict], root: Path, processor, file: Path):
        self.every, self.samples, self.root, self.processor, self.file = (
            every,
            samples,
            root,
            processor,
            file,
        )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            began = time.monotonic()
            model.eval()
            share = accuracy(model, self.processor, self.samples, self.root)
            model.train()
            line = {"step": state.global_step, "accuracy": round(share, 4), "n": len(self.samples)}
            line |= {
                "seconds": round(time.monotonic() - began, 1),
                "time": time.strftime("%H:%M:%S"),
            }
            with self.file.open("a") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--rate", type=float, default=MINI_FULL.sft.learning_rate)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--validate", type=int, default=1250)
    parser.add_argument("--start", default="data/mini/large")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    options = replace(
        MINI_FULL.sft, learning_rate=args.rate, per_device_train_batch_size=args.batch,
        max_steps=args.steps, max_minutes=args.minutes,
    )  # fmt: skip
    family = FAMILIES["qwen3-vl"]
    rows = answer_rows(
        traces(args.data, args.limit), family, args.data, reasoning=True, grid=options.answer_grid,
        label=options.answer_label,
    )  # fmt: skip
    model, processor = load_start(
        str(Path(args.start).resolve()), MINI_FULL.models.large, "float32"
    )
    out = args.out / "model"
    trainer = make_sft_trainer(
        model,
        processor,
        rows,
        family,
        options,
        work=work_folder(out),
        log=args.out / "sft.jsonl",
        seed=0,
    )
    trainer.reader.cache.max_bytes = 6 * 2**30
    trainer.clock.save_seconds = 180
    if args.validate:
        root = MINI_FULL.data.path
        validation = read_jsonl(root / "validation.jsonl")[: args.validate]
        trainer.add_callback(
            Validate(args.every, validation, root, processor, args.out / "validation.jsonl")
        )
    train_to(trainer, processor, out)


if __name__ == "__main__":
    main()
