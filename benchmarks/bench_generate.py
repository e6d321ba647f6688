"""Throughput and memory of answering, in batches with a KV cache and by plain `generate`.

    python benchmarks/bench_generate.py [--model data/mini/small] [--samples 256] [--alone 32]

`generate` answers one request at a time. Both answer the same validation samples of the miniature,
and their greedy texts are compared. Goal: at least 5 times as fast.
"""

import argparse
import resource
import time
from pathlib import Path

import torch

from egm_lib.inference.engine import Request
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.mini.world import recipes, samples
from egm_lib.profile import Sampling


def alone(engine: TransformersEngine, request: Request, max_new_tokens: int) -> str:
    """What plain transformers answers."""
    text = engine.processor.apply_chat_template(
        engine.family.messages(request.prompt), tokenize=False, add_generation_prompt=True
    )
    inputs = engine.processor(text=[text], images=[[request.image]], return_tensors="pt")
    output = engine.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        suppress_tokens=engine.suppress_ids,
    )
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    ids = [token for token in ids if token not in engine.eos_ids]
    return engine.family.reasoning_opener + engine.processor.tokenizer.decode(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("data/mini/small"))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--alone", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    args = parser.parse_args()
    plain = TransformersEngine(args.model, "qwen3-vl", "float32", device="cpu", cache_vision=False)
    sampling = Sampling(
        temperature=0.0,
        top_p=1.0,
        top_k=20,
        max_new_tokens=args.max_new_tokens,
        repetition_penalty=1.0,
    )
    requests = [
        Request(scene.image(), plain.family.prompt(row["expression"], row["task"]))
        for scene, _, rows, _ in samples(recipes()["validation.jsonl"], args.samples)
        for row in rows
    ]
    print(f"{args.model}, float32, {torch.get_num_threads()} thread(s), {len(requests)} samples")
    start, cpu = time.perf_counter(), time.process_time()
    expected = [alone(plain, request, args.max_new_tokens) for request in requests[: args.alone]]
    base = (time.process_time() - cpu) / args.alone
    print(
        f"one by one: {(time.perf_counter() - start) / args.alone * 1000:.0f} ms a sample, "
        f"{base * 1000:.0f} of CPU"
    )
    for batch_size in (16, 64, 256):
        engine = TransformersEngine(args.model, "qwen3-vl", "float32", batch_size, device="cpu")
        start, cpu = time.perf_counter(), time.process_time()
        answers = list(engine.answer(requests, sampling))
        wall, cpu = (
            (time.perf_counter() - start) / len(requests),
            (time.process_time() - cpu) / len(requests),
        )
        same = sum(a.raw_answer == text for a, text in zip(answers, expected, strict=False))
        tokens = sum(a.reasoning_tokens + a.answer_tokens for a in answers) / len(answers)
        print(
            f"batch {batch_size}: {wall * 1000:.0f} ms a sample, {cpu * 1000:.0f} of CPU "
            f"({base / cpu:.1f} times as "
            f"fast), {tokens:.0f} tokens an answer, {same} of {len(expected)} texts the same"
        )
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
