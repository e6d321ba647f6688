"""Prediction rows that are known to hit or miss, for tests of tables and ablations."""

import json


def prediction(task, dataset, split, number, model, solved, seed):
    box = [0, 0, 500, 500] if solved else [500, 500, 1000, 1000]
    return {
        "sample_id": f"{dataset}-{split}-{number}",
        "dataset": dataset,
        "split": split,
        "task": task,
        "image_id": f"{dataset}{number // 2}",
        "expression": "the second red one" if number % 2 else "red one",
        "gt_box": [0.0, 0.0, 50.0, 50.0],
        "width": 100,
        "height": 100,
        "frame": "NORM_1000",
        "model": model,
        "seed": seed,
        "prompt_kind": "ordinal" if number % 2 else "plain",
        "num_lookalikes": number % 2,
        "raw_answer": f'<think>\nlook\n</think>\n\n[{{"bbox_2d": {box}}}]',
        "status": "ok",
        "finish_reason": "stop",
        "reasoning_tokens": 5,
        "answer_tokens": 10,
    }


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
