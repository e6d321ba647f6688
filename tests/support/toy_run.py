"""A complete run folder made by hand: every kind of file that figures and gallery read."""

import json
import random
from pathlib import Path

from trace_world import (
    EGM,
    LARGE,
    SMALL,
    answer_row,
    draw_world,
    group_of,
    predictions_of,
    write_rows,
)

from egm_lib.curation.tasks import CAUSES


def write_run(folder: Path, world: Path, seed: int = 0, count: int = 24) -> Path:
    """Writes folder/toy-<seed>, a run with every kind of file; its images lie below world."""
    root, rng = folder / f"toy-{seed}", random.Random(seed)
    samples = draw_world(world, count)
    rows = predictions_of(samples, seed)
    for row in rows:  # EGM gets a fifth wrong, the large model answers half of the time
        sample = next(each for each in samples if each["sample_id"] == row["sample_id"])
        if row["model"] == EGM and rng.random() < 0.2:
            row |= answer_row(sample, EGM, sample["boxes_all"][1], row["reasoning"], seed)
        if row["model"] == LARGE and rng.random() < 0.5:
            row |= answer_row(sample, LARGE, sample["gt_box"], None, seed)
    for model in (SMALL, EGM, LARGE):
        answered = [row for row in rows if row["model"] == model]
        for split in sorted({(row["dataset"], row["split"]) for row in answered}):
            path = root / "predictions" / model / f"{split[0]}_{split[1]}.jsonl"
            write_rows(path, [row for row in answered if (row["dataset"], row["split"]) == split])
        milliseconds = {SMALL: 20, EGM: 70, LARGE: 90}[model]
        write_rows(
            root / "latency" / f"{model}.jsonl",
            [
                {
                    "sample_id": row["sample_id"],
                    "model": model,
                    "latency_ms": milliseconds + rng.random() * 9,
                    "concurrency": 1,
                    "device": "CPU",
                    "first_token_ms": 9.0,
                    "reasoning_tokens": row["reasoning_tokens"],
                    "answer_tokens": 10,
                }
                for row in answered[:12]
            ],
        )
    for model, weights in ((SMALL, (12, 4, 1, 1, 1)), (LARGE, (4, 4, 2, 2, 2))):
        write_rows(
            root / "failures" / f"{model}.jsonl",
            [
                {"sample_id": sample["sample_id"], "judge": f"judge-{judge}", "cause": cause}
                for sample in samples
                for cause in [rng.choices(CAUSES, weights)[0]]
                for judge in (1, 2, 3)
            ],
        )
    for task in ("vanilla", "amodal"):
        write_rows(
            root / "traces" / f"{task}.jsonl",
            [
                {
                    **sample,
                    "reasoning": "Three squares share this colour. Counting from the left the one "
                    "meant is next "
                    "to the edge; extend downward from the visible part considerably.",
                }
                for sample in samples
                if sample["task"] == task
            ],
        )
    write_rows(
        root / "groups" / "vanilla.jsonl", [group_of(samples[0]) | {"rewards": [0.95, 0.0] * 8}]
    )
    write_rows(
        root / "logs" / "sft-vanilla.jsonl",
        [
            {"step": step, "loss": 3 / (step + 1) + rng.random() / 9, "grad_norm": 1.0}
            for step in range(1, 40)
        ],
    )
    write_rows(
        root / "logs" / "grpo-vanilla.jsonl",
        [
            {
                "step": step,
                "reward": 0.5 + step / 90 + rng.random() / 9,
                "kl": step / 1000,
                "entropy": 1.2 - step / 60,
                "completions/mean_length": 40 - step / 4,
                "loss": rng.random() / 50,
            }
            for step in range(1, 31)
        ],
    )
    manifest = {"git": "0000000", "hardware": "a drawn machine", "wall_seconds": {"sft": 1.0}}
    (root / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return root
