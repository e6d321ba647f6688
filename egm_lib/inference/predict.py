"""Samples -> prediction files: the rows that every table, figure and viewer reads.

    python -m egm_lib.inference.predict --profile mini --model small-base
    python -m egm_lib.inference.predict --profile mini --model small-base --latency

A file is written in the order of its samples; a run that was stopped goes on where it stopped and
leaves the same file.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
import tqdm

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.data import eval_splits, open_image, read_eval, resolve_image, split_id
from egm_lib.data.records import FEATURES
from egm_lib.errors import EgmError, InputError
from egm_lib.files import json_line, read_jsonl, write_jsonl
from egm_lib.inference.decoding import decoded_as
from egm_lib.inference.engine import CONCURRENCIES, Answer, Engine, Request
from egm_lib.inference.from_profile import NO_REASONING, make_engine, model_of
from egm_lib.inference.latency import measure_latency
from egm_lib.parsing import parse_completion
from egm_lib.profile import Sampling
from egm_lib.prompts import DEFAULT_PROMPT
from egm_lib.run import Run

WINDOW_BATCHES = 4  # samples are sorted by length within this many batches, and written together


class Prediction(TypedDict):
    """One line of predictions/<model>/<dataset>_<split>.jsonl: the GroundingSample's fields, then
    these.

    boxes, box: xyxy pixels of the original image; box is the one that counts (null: none). IoU is
    never stored.
    """

    model: str
    revision: str | None
    profile: str
    seed: int
    prompt: str
    raw_answer: str
    frame: str  # BoxFrame of the numbers in raw_answer
    reasoning: str | None
    boxes: list[list[float]]
    box: list[float] | None
    status: str  # "ok" | "no_box" | "unclosed_reasoning" | "malformed" | "error"
    error: str | None
    prompt_tokens: int | None
    reasoning_tokens: int | None
    answer_tokens: int | None
    finish_reason: str  # "stop" | "length" | "error"
    # Null where several are answered together: measure_latency is the place for that
    latency_ms: float | None


class EngineFailure(EgmError, RuntimeError):
    """Every sample of a window failed: the engine is at fault, not a sample."""


def predict(
    samples: Iterable[Mapping],
    engine: Engine,
    *,
    out: Path,
    model: str,
    profile: str,
    seed: int,
    root: Path,
    sampling: Sampling,
    reasoning: bool = True,
    prompt: str = DEFAULT_PROMPT,
    retry_errors: bool = False,
) -> Path:
    """Answers every sample into `out`, in their order; a sample that has its row already is not
    asked again.

    root: the data root that images are relative to. An image that cannot be read, or an engine
    error, marks its row ("error") and the run goes on; retry_errors asks those rows again. Rows are
    appended a window of samples at a time. Window boundaries are the same when a run is resumed, so
    that it batches as an uninterrupted one does. prompt: the name of one of the family's prompts.
    Raises ValueError where `out` holds another model's rows or samples, EngineFailure where a whole
    window failed.
    """
    samples = list(samples)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"model": model, "revision": engine.revision, "profile": profile, "seed": seed}
    done = _finished_rows(out, samples, stamp, retry_errors)
    window = WINDOW_BATCHES * engine.batch_size
    progress = {
        "total": len(samples),
        "initial": len(done),
        "desc": f"{model} {out.stem}",
        "unit": " samples",
    }
    with open(out, "a", encoding="utf-8") as file, tqdm.tqdm(**progress, mininterval=5) as bar:
        for start in range(0, len(samples), window):
            part = samples[start : start + window]
            missing = {sample["sample_id"] for sample in part} - done
            if not missing:
                continue
            rows = list(_answer_rows(part, engine, stamp, root, sampling, reasoning, prompt))
            if all(row["status"] == "error" for row in rows) and len(rows) > 1:
                first = rows[0]["error"]
                raise EngineFailure(
                    f"{model}, {out.stem}: all {len(rows)} samples failed; the first: {first}"
                )
            file.write("".join(json_line(row) for row in rows if row["sample_id"] in missing))
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(missing))
    _put_in_order(out, samples)
    return out


def _finished_rows(
    out: Path, samples: Sequence[Mapping], stamp: Mapping, retry_errors: bool
) -> set[str]:
    """Ids of the rows that `out` holds already; a torn last line and rows to ask again are taken
    out of it.
    """
    if not out.exists():
        return set()
    rows = read_jsonl(out)
    wanted = {sample["sample_id"] for sample in samples}
    for row in rows:
        differing = [name for name, value in stamp.items() if row.get(name) != value]
        if differing or row["sample_id"] not in wanted:
            what = (
                f"{differing[0]} {row.get(differing[0])!r}"
                if differing
                else f"the sample {row['sample_id']!r}"
            )
            raise InputError(
                f"{out} was written for {what}, which this run does not ask for; move the file "
                "away first"
            )
    kept = [row for row in rows if not (retry_errors and row["status"] == "error")]
    write_jsonl(out, kept)
    return {row["sample_id"] for row in kept}


def _put_in_order(out: Path, samples: Sequence[Mapping]) -> None:
    rows = {row["sample_id"]: row for row in read_jsonl(out)}
    order = [sample["sample_id"] for sample in samples]
    if list(rows) != order:
        write_jsonl(out, (rows[sample_id] for sample_id in order))


def _answer_rows(
    samples,
    engine: Engine,
    stamp: Mapping,
    root: Path,
    sampling: Sampling,
    reasoning: bool,
    prompt: str,
):
    answers: dict[int, Answer] = {}
    requests: dict[int, Request] = {}
    for index, sample in enumerate(samples):
        try:
            image = open_image(resolve_image(sample, root))
        except (OSError, ValueError) as error:
            answers[index] = Answer.failed(error)
        else:
            text = engine.family.prompt(sample["expression"], sample["task"], name=prompt)
            requests[index] = Request(image, text)
    given = engine.answer(list(requests.values()), sampling, reasoning=reasoning)
    answers |= dict(zip(requests, given, strict=True))
    for index, sample in enumerate(samples):
        yield _row(sample, answers[index], engine, stamp, prompt)


def _row(sample: Mapping, answer: Answer, engine: Engine, stamp: Mapping, prompt: str) -> dict:
    frame, image_wh = engine.family.frame, (sample["width"], sample["height"])
    reasoning, boxes, box, status = None, [], None, "error"
    num_reasoning, num_answer = answer.reasoning_tokens, answer.answer_tokens
    if answer.error is None:
        parsed = parse_completion(answer.raw_answer, frame=frame, image_wh=image_wh)
        reasoning, boxes, box, status = parsed.reasoning, parsed.boxes, parsed.box, parsed.status
        if status == "unclosed_reasoning" and num_answer is not None:  # all of it was reasoning
            num_reasoning, num_answer = (num_reasoning or 0) + num_answer, 0
    return {
        **{name: sample.get(name) for name in FEATURES},
        **stamp,
        "prompt": engine.family.prompt(sample["expression"], sample["task"], name=prompt),
        "raw_answer": answer.raw_answer,
        "frame": frame.name,
        "reasoning": reasoning,
        "boxes": [list(map(float, each)) for each in boxes],
        "box": None if box is None else list(map(float, box)),
        "status": status,
        "error": answer.error,
        "prompt_tokens": answer.prompt_tokens,
        "reasoning_tokens": num_reasoning,
        "answer_tokens": num_answer,
        "finish_reason": answer.finish_reason,
        "latency_ms": answer.latency_ms if engine.batch_size == 1 else None,
    }


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("inference.predict", "Predict evaluation splits.")
    parser.add_argument(
        "--model", required=True, action="append", help="e.g. small-egm; may be given several times"
    )
    parser.add_argument(
        "--task",
        choices=("vanilla", "amodal"),
        action="append",
        help="default: the profile's tasks",
    )
    parser.add_argument(
        "--split", action="append", help="e.g. refcoco+_testA; default: every split of the task"
    )
    parser.add_argument(
        "--limit", type=int, help="samples per split; default: the profile's eval_limit"
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="ask again where a row is marked as an error"
    )
    parser.add_argument(
        "--latency", action="store_true", help="measure latency (vanilla) instead of predicting"
    )
    parser.add_argument("--latency-samples", type=int, default=64)
    parser.add_argument(
        "--concurrency", type=int, action="append", help="of --latency; default: 1 and 64"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    return ends(lambda: _predict_all(args))


def _predict_all(args: argparse.Namespace) -> None:
    run = run_of(args)
    for model in args.model:
        for task in ("vanilla",) if args.latency else (args.task or run.profile.tasks):
            _predict_task(run, model, task, args)


def _predict_task(run: Run, model: str, task: str, args: argparse.Namespace) -> None:
    profile = run.profile
    splits = [pair for pair in eval_splits(task) if not args.split or split_id(*pair) in args.split]
    if not splits:
        return
    checkpoint = model_of(run, model, task)
    plain = make_engine(profile, checkpoint, run.seed, for_latency=args.latency)
    with contextlib.closing(decoded_as(plain, model)) as engine:  # before the next one is built
        _use_engine(engine, splits, run, model, args)


def _use_engine(
    engine: Engine,
    splits: Sequence[tuple[str, str]],
    run: Run,
    model: str,
    args: argparse.Namespace,
) -> None:
    profile, root = run.profile, run.profile.data.path
    limit = profile.data.eval_limit if args.limit is None else args.limit
    common = {"model": model, "root": root, "sampling": profile.generation.sampling}
    common["prompt"] = profile.evaluation.prompt
    common["reasoning"] = not model.partition("@")[0].endswith(NO_REASONING)
    if args.latency:
        samples = [sample for pair in splits for sample in read_eval(root, *pair, limit)]
        out = run.root / "latency" / f"{model}.jsonl"
        options = {
            "num_samples": args.latency_samples,
            "concurrencies": args.concurrency or CONCURRENCIES,
        }
        measure_latency(samples, engine, out=out, seed=run.seed, **options, **common)
        return
    for pair in splits:
        start = time.perf_counter()
        samples = read_eval(root, *pair, limit)
        out = run.predictions(model, split_id(*pair))
        predict(
            samples,
            engine,
            out=out,
            profile=profile.name,
            seed=run.seed,
            retry_errors=args.retry_errors,
            **common,
        )
        print(
            f"{model} {out.stem}: {len(samples)} samples in {time.perf_counter() - start:.1f} s -> "
            f"{out}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
