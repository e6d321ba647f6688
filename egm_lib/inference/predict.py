"""Samples -> prediction files: the rows that every table, figure and viewer reads.

    python -m egm_lib.inference.predict --profile mini --model small-base
    python -m egm_lib.inference.predict --profile mini --model small-base --latency

A file is written in the order of its samples; a run that was stopped continues there and
leaves the same file. With `--shard 1/4` to `--shard 4/4` four processes share the samples
(egm_lib.inference.shards).
"""

import argparse
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import tqdm

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.data import eval_splits, read_eval, read_validation, split_id
from egm_lib.data.records import FEATURES, Prediction
from egm_lib.errors import EgmError, InputError
from egm_lib.files import json_line, write_jsonl
from egm_lib.inference.decoding import decoded_as
from egm_lib.inference.engine import (
    CONCURRENCIES,
    WINDOW_BATCHES,
    Answer,
    Engine,
    Request,
    request_of,
)
from egm_lib.inference.from_profile import make_engine, model_of, prompt_of
from egm_lib.inference.shards import (
    WHOLE,
    Shard,
    add_shard_option,
    files_with_rows,
    merge,
    whole_rows,
)
from egm_lib.parsing import parse_completion
from egm_lib.profile import NO_REASONING, Sampling
from egm_lib.prompts import DEFAULT_PROMPT, TASKS
from egm_lib.run import Run


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
    shard: Shard = WHOLE,
) -> Path:
    """Answers every sample into `out`, in their order; a sample that has its row already is not
    asked again.

    root: the data root that images are relative to. An image that cannot be read, or an engine
    error, marks its row ("error") and the run continues; retry_errors asks those rows again. Rows
    are appended a window of samples at a time. Window boundaries are the same when a run is
    resumed, so that it batches as an uninterrupted one does. prompt: the name of one of the
    family's prompts. shard: the samples that this process answers; `out` is written once all shards
    are finished. Raises ValueError where `out` holds another model's rows or samples, EngineFailure
    where a whole window failed.
    """
    out, samples = Path(out), list(samples)
    stamp = {"model": model, "revision": engine.revision, "profile": profile, "seed": seed}
    known = _known_rows(out, samples, stamp, retry_errors)
    if len(known) == len(samples):
        shard = WHOLE  # nothing is left to be shared
    file, dealt = shard.file(out), shard.of(samples)
    write_jsonl(file, (known[row["sample_id"]] for row in dealt if row["sample_id"] in known))
    done = known.keys() & {sample["sample_id"] for sample in dealt}
    window = _window(engine)
    chunk = window or WINDOW_BATCHES * engine.batch_size  # rows that are written together
    parts = _parts(dealt, done, window)
    unreadable: set[str] = set()  # samples that never reach the engine
    rows = _answer_rows(parts, engine, stamp, root, sampling, reasoning, prompt, unreadable)
    progress = {
        "total": len(dealt),
        "initial": len(done),
        "desc": f"{model} {out.stem}" + (f" {shard}" if shard.count > 1 else ""),
        "unit": " samples",
    }
    with (
        contextlib.closing(rows),
        open(file, "a", encoding="utf-8") as opened,
        tqdm.tqdm(**progress, mininterval=5) as bar,
    ):
        while written := list(islice(rows, chunk)):
            # A few rows of an endpoint that are asked once more may all fail again
            few = window is None and done and len(written) < chunk
            asked = [row for row in written if row["sample_id"] not in unreadable]
            if len(asked) > 1 and all(row["status"] == "error" for row in asked) and not few:
                raise EngineFailure(
                    f"{model}, {out.stem}: all {len(written)} samples failed; the first: "
                    f"{written[0]['error']}"
                )
            new = [row for row in written if row["sample_id"] not in done]
            opened.write("".join(map(json_line, new)))
            opened.flush()
            os.fsync(opened.fileno())
            bar.update(len(new))
    if unfinished := merge(out, samples, shard):
        print(f"{out.stem}: shard {shard} is done; unfinished: {', '.join(unfinished)}", flush=True)
    return out


def _known_rows(
    out: Path, samples: Sequence[Mapping], stamp: Mapping, retry_errors: bool
) -> dict[str, dict]:
    """The rows that `out` and its shards hold already, by sample. A torn last line and rows to ask
    again are left out.
    """
    asked = {sample["sample_id"] for sample in samples}
    known = {}
    for path in files_with_rows(out):
        for row in whole_rows(path):
            _check_row(row, path, asked, stamp)
            if not (retry_errors and row["status"] == "error"):
                known[row["sample_id"]] = row
    return known


def _check_row(row: Mapping, path: Path, asked: set[str], stamp: Mapping) -> None:
    """Raises InputError for a row of another model, profile or seed, or of another sample."""
    differing = [name for name, value in stamp.items() if row.get(name) != value]
    if not differing and row["sample_id"] in asked:
        return
    what = f"the sample {row['sample_id']!r}"
    if differing:
        what = f"{differing[0]} {row.get(differing[0])!r}"
    raise InputError(
        f"{path} was written for {what}, which this run does not ask for; move the file away first"
    )


def _window(engine: Engine) -> int | None:
    """Samples that are handed to an engine together; None: one after the other, as it takes them.

    Where each request is answered on its own, none then waits for the slowest of a window.
    """
    batches = engine.window_batches
    return None if batches is None else batches * engine.batch_size


def _parts(
    samples: Sequence[Mapping], done: set[str], window: int | None
) -> list[Sequence[Mapping]]:
    """The samples to ask, in parts that are handed over together.

    A window with a missing row is asked whole, since an answer may depend on its batch.
    """

    def missing(part: Sequence[Mapping]) -> list[Mapping]:
        return [sample for sample in part if sample["sample_id"] not in done]

    if window is None:
        return [missing(samples)]
    parts = (samples[start : start + window] for start in range(0, len(samples), window))
    return [part for part in parts if missing(part)]


def _answer_rows(
    parts: Sequence[Sequence[Mapping]],
    engine: Engine,
    stamp: Mapping,
    root: Path,
    sampling: Sampling,
    reasoning: bool,
    prompt: str,
    unreadable: set[str],
) -> Iterator[dict]:
    """A row of each sample, in order. Images are decoded while the engine answers earlier ones.

    unreadable: takes the samples whose request could not be made.
    """
    request = partial(request_of, family=engine.family, root=root, prompt=prompt)
    ahead = _window(engine) or engine.batch_size
    with contextlib.closing(
        _map_ahead(request, (sample for part in parts for sample in part), ahead)
    ) as requests:
        for part in parts:
            waiting: deque[tuple[Mapping, Answer | None]] = deque()
            valid = _valid_requests(zip(part, requests, strict=False), waiting, unreadable)
            if _window(engine) is not None:
                valid = list(valid)
            for answer in engine.answer(valid, sampling, reasoning=reasoning):
                while waiting[0][1] is not None:
                    yield _row(*waiting.popleft(), engine, stamp, prompt)
                sample, _ = waiting.popleft()
                yield _row(sample, answer, engine, stamp, prompt)
            for sample, failure in waiting:
                yield _row(sample, failure, engine, stamp, prompt)


def _valid_requests(
    pairs: Iterable[tuple[Mapping, Request | Answer]], waiting: deque, unreadable: set[str]
) -> Iterator[Request]:
    """The requests among the pairs. waiting: takes each sample, and its answer if it has failed;
    unreadable: the ids of those.
    """
    for sample, request in pairs:
        failed = isinstance(request, Answer)
        if failed:
            unreadable.add(sample["sample_id"])
        waiting.append((sample, request if failed else None))
        if not failed:
            yield request


def _map_ahead(work: Callable, items: Iterable, ahead: int) -> Iterator:
    """map(work, items) in a thread, which is up to `ahead` items in front of the reader."""
    with ThreadPoolExecutor(1) as pool:
        futures: deque = deque()
        try:
            for item in items:
                futures.append(pool.submit(work, item))
                if len(futures) > ahead:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()


def _row(
    sample: Mapping, answer: Answer, engine: Engine, stamp: Mapping, prompt: str
) -> Prediction:
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
        "frame": frame.value,
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
        choices=TASKS,
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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--latency", action="store_true", help="measure latency (vanilla) instead of predicting"
    )
    instead.add_argument(
        "--validation", action="store_true", help="answer the validation split (vanilla) instead"
    )
    add_shard_option(parser)
    parser.add_argument("--latency-samples", type=int, default=64)
    parser.add_argument(
        "--concurrency", type=int, action="append", help="of --latency; default: 1 and 64"
    )
    args = parser.parse_args(argv)
    if args.latency and args.shard.count > 1:
        parser.error("latency is measured in one process: leave --shard out")
    if args.task and (args.latency or args.validation):
        parser.error("--latency and --validation are of the vanilla task: leave --task out")
    known = [split_id(*pair) for task in TASKS for pair in eval_splits(task)]
    if unknown := set(args.split or ()) - set(known):
        parser.error(f"there is no split {min(unknown)}; known: {', '.join(known)}")
    import torch  # only here and below: a notebook that knows `predict` opens without it

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    return ends(lambda: _predict_all(args))


def _predict_all(args: argparse.Namespace) -> None:
    run = run_of(args)
    for model in args.model:
        vanilla_only = args.latency or args.validation
        tasks = ("vanilla",) if vanilla_only else (args.task or run.profile.tasks)
        splits = {
            task: [pair for pair in eval_splits(task) if _wanted(pair, args)] for task in tasks
        }
        asked = [task for task in tasks if splits[task]]
        # One engine for the tasks of a base model; a trained one has a checkpoint for each
        for checkpoint, group in groupby(asked, partial(model_of, run, model)):
            answered = list(group)
            pairs = [pair for task in answered for pair in splits[task]]
            prompt = prompt_of(run.profile, model, checkpoint, answered)
            plain = make_engine(run.profile, checkpoint, run.seed, for_latency=args.latency)
            # Closed before the next one is built
            with contextlib.closing(decoded_as(plain, model)) as engine:
                _use_engine(engine, pairs, run, model, prompt, args)


def _wanted(pair: tuple[str, str], args: argparse.Namespace) -> bool:
    return not args.split or split_id(*pair) in args.split


def _use_engine(
    engine: Engine,
    splits: Sequence[tuple[str, str]],
    run: Run,
    model: str,
    prompt: str,
    args: argparse.Namespace,
) -> None:
    profile, root = run.profile, run.profile.data.path
    limit = profile.data.eval_limit if args.limit is None else args.limit
    common = {"model": model, "root": root, "sampling": profile.generation.sampling}
    common["prompt"] = prompt
    common["reasoning"] = not model.partition("@")[0].endswith(NO_REASONING)
    if args.latency:
        from egm_lib.inference.latency import measure_latency

        samples = [sample for pair in splits for sample in read_eval(root, *pair, limit)]
        out = run.root / "latency" / f"{model}.jsonl"
        options = {
            "num_samples": args.latency_samples,
            "concurrencies": args.concurrency or CONCURRENCIES,
        }
        measure_latency(samples, engine, out=out, seed=run.seed, **options, **common)
        return
    files = {
        run.predictions(model, split_id(*pair)): partial(read_eval, root, *pair, limit)
        for pair in splits
    }
    if args.validation:
        files = {run.validation(model): partial(read_validation, root, args.limit)}
    for out, read in files.items():
        start, samples = time.perf_counter(), read()
        predict(
            samples,
            engine,
            out=out,
            profile=profile.name,
            seed=run.seed,
            retry_errors=args.retry_errors,
            shard=args.shard,
            **common,
        )
        seconds, count = time.perf_counter() - start, len(args.shard.of(range(len(samples))))
        print(f"{model} {out.stem}: {count} samples in {seconds:.1f} s -> {out}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
