"""A pilot of the varied teacher on validation scenes: SFT, then GRPO or SFT continued, in steps.

    python experiments/pilot.py NAME sft --ways .7 .2 .1 --steps 5800
    python experiments/pilot.py NAME grpo --steps 200          # fresh prompts of selection.jsonl
    python experiments/pilot.py NAME control --steps 4000      # SFT continued
    python experiments/pilot.py NAME answer MODEL ...          # validation.jsonl

Traces are the curated ones of mini-full (seed 0, uniform teacher), told in the way that the varied
teacher draws for the sample; its planted errors fall on the same samples. No test split is read.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from egm_lib.boxes import iou
from egm_lib.data import open_image, resolve_image
from egm_lib.files import project_root, read_jsonl
from egm_lib.grpo import run_grpo
from egm_lib.inference.engine import Request
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.mini.language import retell, way_of
from egm_lib.mini.teacher import TeacherTransport
from egm_lib.parsing import parse_completion
from egm_lib.profile import load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.run import Run
from egm_lib.sft import answer_rows, make_sft_trainer, read_traces
from egm_lib.training.checkpoints import is_finished, train_to, work_folder
from egm_lib.training.model_setup import load_start

MINI_FULL = load_profile("mini-full")
QWEN = FAMILIES["qwen3-vl"]
SEED = 0


@dataclass(frozen=True)
class Pilot(Run):
    name: str

    @property
    def root(self) -> Path:
        return project_root() / "data/runs/pilots" / self.name


def varied_traces(shares: list[float]) -> list[dict]:
    ways = dict(zip(("worked", "concluding", "restating"), shares, strict=True))
    teacher = TeacherTransport(MINI_FULL.data.path / "teacher.jsonl")
    rows = read_traces(Run(MINI_FULL, SEED).traces("vanilla"), MINI_FULL.data.path, "vanilla")
    return [
        row
        | {
            "reasoning": retell(
                row["reasoning"], row["expression"], teacher.way(row["sample_id"], ways)
            )
        }
        for row in rows
    ]


def sft(run: Pilot, name: str, start: str, shares: list[float], options, seed: int) -> None:
    out = run.checkpoint("vanilla", name)
    if is_finished(out):
        return
    rows = answer_rows(
        varied_traces(shares), QWEN, MINI_FULL.data.path, reasoning=True,
        grid=options.answer_grid, label=options.answer_label,
    )  # fmt: skip
    model, processor = load_start(start, MINI_FULL.models.small, "float32")
    trainer = make_sft_trainer(
        model, processor, rows, QWEN, options, work=work_folder(out), log=run.log(f"{name}.jsonl"),
        seed=seed,
    )  # fmt: skip
    train_to(trainer, processor, out)


def answer(run: Pilot, name: str, folder: str, count: int) -> None:
    """Accuracy and ways of reasoning on validation.jsonl; answers are kept."""
    root = MINI_FULL.data.path
    samples = read_jsonl(root / "validation.jsonl")[:count]
    engine = TransformersEngine(folder, "qwen3-vl", batch_size=64, seed=SEED)
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        began = time.monotonic()
        top_k = MINI_FULL.generation.sampling.top_k if temperature == 0 else None
        sampling = replace(MINI_FULL.generation.sampling, temperature=temperature, top_k=top_k)
        requests = [
            Request(open_image(resolve_image(s, root)), QWEN.prompt(s["expression"], "vanilla"))
            for s in samples
        ]
        rows = []
        for sample, given in zip(samples, engine.answer(requests, sampling), strict=True):
            wh = (sample["width"], sample["height"])
            parsed = parse_completion(given.raw_answer, frame=QWEN.frame, image_wh=wh)
            right = parsed.box is not None and iou(parsed.box, sample["gt_box"]) > 0.5
            way = way_of(parsed.reasoning, sample["expression"])
            keep = ("sample_id", "image_id", "prompt_kind")
            row = {key: sample[key] for key in keep} | {"right": right, "way": way}
            rows.append(row | {"raw_answer": given.raw_answer})
        out = run.root / "answers" / f"{name}-{kind}.jsonl"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        hard = [row for row in rows if row["prompt_kind"] != "plain"]
        ways = {way: round(n / len(hard), 3) for way, n in Counter(r["way"] for r in hard).items()}
        line = {"model": name, "decoding": kind, "n": len(rows), "ways_of_not_plain": ways}
        line |= {"accuracy": round(sum(row["right"] for row in rows) / len(rows), 4)}
        line |= {"seconds": round(time.monotonic() - began, 1)}
        print(json.dumps(line), flush=True)
        with (run.root / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("act", choices=("sft", "grpo", "control", "answer"))
    parser.add_argument("models", nargs="*")
    parser.add_argument("--ways", type=float, nargs=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--count", type=int, default=1250)
    args = parser.parse_args()
    torch.set_num_threads(1)
    limits = {"max_steps": args.steps, "max_minutes": args.minutes}
    profile = replace(
        MINI_FULL, sft=replace(MINI_FULL.sft, num_train_epochs=100.0, **limits),
        grpo=replace(MINI_FULL.grpo, **limits),
    )  # fmt: skip
    run = Pilot(profile, SEED, args.name)
    run.root.mkdir(parents=True, exist_ok=True)
    declared = run.root / "ways.json"
    if args.act == "sft":
        declared.write_text(json.dumps(args.ways))
        sft(run, "small-sft", profile.models.small.location, args.ways, profile.sft, SEED)
    elif args.act == "control":
        start, shares = run.checkpoint("vanilla", "small-sft"), json.loads(declared.read_text())
        sft(run, "small-sft-control", str(start), shares, profile.sft, SEED + 1)
    elif args.act == "grpo":
        prompts = run.samples("rl_vanilla")
        prompts.parent.mkdir(parents=True, exist_ok=True)
        prompts.write_text((profile.data.path / "selection.jsonl").read_text())
        run_grpo(run, "vanilla")
    else:
        for name in args.models:
            base = {"small-base": profile.models.small, "large-base": profile.models.large}
            base["reference"] = replace(profile.models.large, path="data/mini/reference")
            place = base[name].location if name in base else run.checkpoint("vanilla", name)
            answer(run, name, str(place), args.count)


if __name__ == "__main__":
    main()
