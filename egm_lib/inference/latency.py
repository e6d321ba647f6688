"""The latency protocol: time to the complete answer, and to its first token."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import tqdm
import transformers

from egm_lib.files import write_jsonl
from egm_lib.inference.engine import CONCURRENCIES, Answer, Engine, Request, request_of
from egm_lib.profile import Sampling
from egm_lib.prompts import DEFAULT_PROMPT


def measure_latency(
    samples: Sequence[Mapping],
    engine: Engine,
    *,
    out: Path,
    model: str,
    root: Path,
    sampling: Sampling,
    reasoning: bool = True,
    prompt: str = DEFAULT_PROMPT,
    num_samples: int = 64,
    concurrencies: Sequence[int] = CONCURRENCIES,
    warmup: int = 3,
    seed: int = 0,
) -> list[dict]:
    """Time from handing a request over to its complete answer, and to its first token; rows written
    to `out`.

    For each concurrency a seeded random subset of the samples (the paper: a random 10 % of RefCOCO)
    of num_samples, or of four times the concurrency where that is more, after `warmup` unmeasured
    requests (as many as the concurrency where that is more). Those ask other samples, and what is
    measured was not asked at an earlier concurrency either; images are others too, as long as there
    are enough. So an engine that remembers prompts and images gains nothing. Concurrency 64 is 64
    requests on the way to an endpoint at any time, and a batch of 64 for the other engines, whose
    answers come together; it is left out where there are fewer samples than that. Images are read
    before the clock starts; their preprocessing and the chat template are inside it. An image that
    cannot be read, or an engine error, marks its row.
    """
    about = {
        "model": model,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        **engine.describe(),
    }
    plain_batch, rows = engine.batch_size, []
    shuffled = random.Random(seed).sample(list(samples), len(samples))
    seen: list[Mapping] = []
    for concurrency in concurrencies:
        num_warmup = max(warmup, concurrency)
        number = max(num_samples, 4 * concurrency if concurrency > 1 else 0)
        number = min(number, len(samples) - num_warmup)
        if number < concurrency:
            print(
                f"latency at concurrency {concurrency}: not run, there are {len(samples)} samples, "
                f"{num_warmup} of them to warm up on",
                flush=True,
            )
            continue
        unseen_first = _least_seen_first(shuffled, seen)
        chosen = unseen_first[:number]
        unmeasured = _least_seen_first(unseen_first[number:], chosen)[:num_warmup]
        seen += chosen + unmeasured
        warm, asked = (
            [request_of(sample, engine.family, root, prompt) for sample in part]
            for part in (unmeasured, chosen)
        )
        warm, requests = (
            [each for each in part if isinstance(each, Request)] for part in (warm, asked)
        )
        engine.batch_size = concurrency
        list(engine.answer(warm, sampling, reasoning=reasoning))
        # An endpoint keeps to its batch_size itself
        wave = max(1, len(requests)) if engine.window_batches is None else concurrency
        answers: list[Answer] = []
        with tqdm.tqdm(
            total=number, desc=f"latency {model}, {concurrency} at a time", mininterval=5
        ) as bar:
            for start in range(0, len(requests), wave):
                for answer in engine.answer(
                    requests[start : start + wave], sampling, reasoning=reasoning
                ):
                    answers.append(answer)
                    bar.update()
        measured = iter(answers)
        answers = [each if isinstance(each, Answer) else next(measured) for each in asked]
        rows += [
            {
                "sample_id": sample["sample_id"],
                "dataset": sample["dataset"],
                "split": sample["split"],
                "task": sample["task"],
                **about,
                "concurrency": concurrency,
                "latency_ms": answer.latency_ms,
                "first_token_ms": answer.first_token_ms,
                "prompt_tokens": answer.prompt_tokens,
                "reasoning_tokens": answer.reasoning_tokens,
                "answer_tokens": answer.answer_tokens,
                "finish_reason": answer.finish_reason,
                "error": answer.error,
            }
            for sample, answer in zip(chosen, answers, strict=True)
        ]
    engine.batch_size = plain_batch
    write_jsonl(out, rows)
    return rows


def _least_seen_first(samples: Sequence[Mapping], seen: Sequence[Mapping]) -> list[Mapping]:
    """Samples about images that were not seen, then other samples about them, then seen samples."""
    ids, images = ({sample[key] for sample in seen} for key in ("sample_id", "image"))
    return sorted(samples, key=lambda each: (each["sample_id"] in ids, each["image"] in images))
