"""At which budget of training does amodal reasoning pay? SFT against direct training.

    python experiments/amodal_budget.py train OUT --passes 0.5 1 2 4
    python experiments/amodal_budget.py report OUT

Both models start from the small base. At each budget the direct one trains on as many tokens as
SFT. The samples and traces are those of a finished run of mini (seed 0). Both models answer its
amodal prompts of the selection scenes, on which neither was trained. No test split is read.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from egm_lib.boxes import iou
from egm_lib.data import open_image, resolve_image
from egm_lib.evaluation.statistics import estimate, paired_difference
from egm_lib.files import read_jsonl, write_jsonl
from egm_lib.inference.engine import Request
from egm_lib.inference.loading import load_processor
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.parsing import parse_completion
from egm_lib.profile import load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.run import Run
from egm_lib.sft import answer_rows, make_sft_trainer, mean_tokens, read_traces
from egm_lib.training.checkpoints import is_finished, train_to, work_folder
from egm_lib.training.clock import logged_tokens
from egm_lib.training.model_setup import load_start
from egm_lib.training.sft_trainers import PlainCollator

MINI = load_profile("mini")
SMALL, QWEN, SEED = MINI.models.small, FAMILIES["qwen3-vl"], 0
WAYS = {"sft": True, "direct": False}


def train(out: Path, way: str, passes: float) -> Path:
    """One model: SFT for so many passes over the traces, or direct training on as many tokens."""
    name, reasoning = f"{way}-{passes:g}", WAYS[way]
    folder, log = out / "checkpoints" / name, out / "logs" / f"{name}.jsonl"
    if is_finished(folder):
        return folder
    root, options = MINI.data.path, replace(MINI.sft, num_train_epochs=passes)
    traces = read_traces(Run(MINI, SEED).traces("amodal"), root, "amodal")
    rows = list(
        answer_rows(
            traces,
            QWEN,
            root,
            reasoning=reasoning,
            grid=options.answer_grid,
            label=options.answer_label,
        )
    )
    model, processor = load_start(SMALL.location, SMALL, options.dtype)
    if not reasoning:
        budget = logged_tokens(out / "logs" / f"sft-{passes:g}.jsonl")
        collator = PlainCollator(processor, options.max_length)
        per_step = options.per_device_train_batch_size * mean_tokens(rows, collator)
        options = replace(options, max_steps=max(1, round(budget / per_step)))
    work = work_folder(folder)
    trainer = make_sft_trainer(model, processor, rows, QWEN, options, work=work, log=log, seed=SEED)
    return train_to(trainer, load_processor(SMALL.location, SMALL.family), folder)


def chosen_box(box: list[float], truth: Mapping) -> str:
    """What a box in pixels overlaps most: the target, something that resembles it, or neither."""
    to_target = iou(box, truth["gt_box"])
    to_lookalike = max((iou(box, other) for other in truth["lookalike_boxes_px"]), default=0.0)
    if max(to_target, to_lookalike) == 0:
        return "nothing"
    return "target" if to_target >= to_lookalike else "lookalike"


def answer(out: Path, name: str, folder: str) -> None:
    """Greedy answers to the fresh prompts, each with what was chosen and how well it fits."""
    path = out / "answers" / f"{name}.jsonl"
    if path.exists():
        return
    root = MINI.data.path
    samples = read_jsonl(Run(MINI, SEED).root / "samples" / "selection_amodal.jsonl")
    truths = {row["sample_id"]: row for row in read_jsonl(root / "teacher.jsonl")}
    engine = TransformersEngine(folder, SMALL.family, batch_size=64, seed=SEED)
    requests = [
        Request(open_image(resolve_image(s, root)), QWEN.prompt(s["expression"], "amodal"))
        for s in samples
    ]
    rows = []
    for sample, given in zip(
        samples, engine.answer(requests, MINI.generation.sampling), strict=True
    ):
        wh = (sample["width"], sample["height"])
        parsed = parse_completion(given.raw_answer, frame=QWEN.frame, image_wh=wh)
        truth = truths[sample["sample_id"]] | {"gt_box": sample["gt_box"]}
        keep = ("sample_id", "image_id", "dataset", "split", "prompt_kind")
        overlap = 0.0 if parsed.box is None else iou(parsed.box, sample["gt_box"])
        rows.append(
            {key: sample[key] for key in keep}
            | {"success": overlap > 0.5, "iou": round(overlap, 4), "reasoning": parsed.reasoning}
            | {"chosen": "nothing" if parsed.box is None else chosen_box(parsed.box, truth)}
        )
    write_jsonl(path, rows)


def scored(out: Path, name: str) -> pd.DataFrame:
    rows = pd.DataFrame(read_jsonl(out / "answers" / f"{name}.jsonl"))
    rows["target"] = rows["chosen"] == "target"
    return rows


def report(out: Path) -> list[dict]:
    """A row for each budget: both accuracies, their difference, and where the difference lies."""
    found = []
    passes = sorted(float(p.stem.split("-", 1)[1]) for p in (out / "answers").glob("sft-*.jsonl"))
    base = estimate(scored(out, "small-base"))
    for each in passes:
        row: dict = {"passes": each, "small_base": round(base.mean, 4)}
        models = {way: scored(out, f"{way}-{each:g}") for way in WAYS}
        for way, rows in models.items():
            log = out / "logs" / f"{way}-{each:g}.jsonl"
            plain = rows["prompt_kind"] == "plain"
            row[way] = {
                "steps": max(line.get("step", 0) for line in read_jsonl(log)),
                "tokens": logged_tokens(log),
                "accuracy": round(rows["success"].mean(), 4),
                "plain": round(rows["success"][plain].mean(), 4),
                "not_plain": round(rows["success"][~plain].mean(), 4),
                "chose_target": round(rows["target"].mean(), 4),
                "success_if_target": round(rows["success"][rows["target"]].mean(), 4),
                "iou_if_target": round(rows["iou"][rows["target"]].mean(), 4),
            }
        for column in ("success", "target"):
            gap = paired_difference(models["sft"], models["direct"], column)
            row[f"difference_{column}"] = [round(v, 4) for v in (gap.mean, *gap.ci95)]
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("act", choices=("train", "report"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--passes", type=float, nargs="+", default=[0.5, 1, 2, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.act == "report":
        print(*map(json.dumps, report(args.out)), sep="\n")
        return
    answer(args.out, "small-base", SMALL.location)
    for passes in args.passes:
        for way in WAYS:
            answer(args.out, f"{way}-{passes:g}", str(train(args.out, way, passes)))


if __name__ == "__main__":
    main()
