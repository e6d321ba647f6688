"""Latency of the paper's model shapes with random weights: first token, each token, whole answer.

    python benchmarks/bench_latency_scale.py                    # what fits on this machine
    python benchmarks/bench_latency_scale.py --only Qwen3-VL-2B --again

The image is 640 x 480 px, the prompt has 30 more tokens, and answers have a fixed number of tokens,
greedy: 42 and 101 are those of the paper's teaser. Each case runs in a process of its own. A case
that says "1/4 of the layers" is a model of a quarter of the layers, and is measured and predicted
as such; nothing is extrapolated from it.

On a CPU one thread is used and its CPU time is taken: other work on the machine does not count, and
on an idle machine it is the time that one waits. On a GPU it is the wall's time, after a warm-up.

What the device reaches (reading weights, matrix products) is measured before and after. Results go
to results/latency-scale/<device>.json, from which `python -m egm_lib.reports.efficiency` compares
them with the roofline. A case that does not fit is written there too, as not run. What the file
holds of the same machine is kept, so a run that was cut off continues; --again measures it anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import transformers

from egm_lib.files import project_root, read_json, write_text
from egm_lib.inference.decode_loop import Prefix, SamplingOptions, complete, read_inputs
from egm_lib.inference.loading import DTYPES
from egm_lib.inference.random_models import cut, random_inputs, random_model
from egm_lib.model_shapes import SHAPES, shape_of

IMAGE_WH = (640, 480)
PROMPT_TOKENS = 30
DIRECT, REASONED, LONG = 42, 101, 1000  # the teaser's two answers; a long trace of thoughts
OUT = project_root() / "results" / "latency-scale"
# A layer of the 2B model; a GPU reads that in the time that Python takes to ask for it
PROBE_WEIGHTS = {"cpu": (6144, 2048), "cuda": (16_384, 16_384)}
PROBE_LAYERS = 12  # more than any cache holds
CPU_LIMIT_GB = 10  # and 0.7 of what is free: others use the machine


@dataclass(frozen=True)
class Case:
    """share: one of so many layers. answers: the numbers of tokens that are written."""

    model: str
    dtype: str = "float32"
    requests: int = 1
    answers: tuple[int, ...] = (DIRECT, REASONED)
    share: int = 1


CPU_CASES = (
    Case("Qwen3-VL-2B"),
    Case("Qwen3-VL-2B", "bfloat16"),
    Case("Qwen3-VL-4B", "bfloat16", answers=(DIRECT,)),
    Case("Qwen3-VL-2B", "bfloat16", answers=(12,), share=4),
    Case("Qwen3-VL-2B", requests=8, answers=(12,), share=4),
    Case("Qwen3-VL-4B", answers=(12,), share=4),
    Case("Qwen3-VL-8B", "bfloat16", answers=(12,), share=4),
    Case("InternVL3-1B", answers=(30,), share=4),
    Case("Qwen3-VL-4B"),
    Case("Qwen3-VL-8B"),
    Case("Qwen3-VL-2B", requests=64),
    Case("Qwen3-VL-2B", answers=(LONG,)),
)
GPU_CASES = (
    *(
        Case(model, "bfloat16", requests, answers)
        for model in SHAPES
        for requests, answers in ((1, (DIRECT, REASONED)), (8, (REASONED,)), (64, (REASONED,)))
    ),
    Case("Qwen3-VL-8B", "bfloat16", answers=(LONG,)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", choices=SHAPES, help="these models alone")
    parser.add_argument("--again", action="store_true", help="what was measured before too")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
    elif args.probe:
        print(json.dumps(probe()))
    else:
        run(args.only, args.out, args.again)


def run(only: Sequence[str] | None, out: Path, again: bool) -> None:
    """Every case in a process of its own; the file is written after each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path, here = out / f"{device}.json", machine(device)
    cases = {key(asdict(case)): case for case in (GPU_CASES if device == "cuda" else CPU_CASES)}
    before = read_json(path) if path.exists() else {}
    if before.get("machine") != here:
        before = {"rows": [], "load": [], "probes": []}
    rows = {key(row): row for row in before["rows"]}
    record = {"machine": here, "image_wh": IMAGE_WH, "prompt_tokens": PROMPT_TOKENS, **before}

    def save() -> None:
        record["rows"] = [rows[name] for name in cases if name in rows]
        record["load"].append(round(os.getloadavg()[0], 1))
        write_text(path, json.dumps(record, indent=1) + "\n")

    def probe_again() -> None:
        reached = in_process("--probe")
        if reason := reached.get("not_run"):
            sys.exit(f"What this device reaches could not be measured: {reason}.")
        record["probes"].append(reached)

    probe_again()
    for name, case in cases.items():
        kept = name in rows and not rows[name].get("not_run") and not again
        if kept or (only and case.model not in only):
            continue
        reason = why_not(case, device)
        row = {"not_run": reason} if reason else in_process("--case", json.dumps(asdict(case)))
        rows[name] = asdict(case) | row
        print(line(rows[name]), flush=True)
        save()
    probe_again()
    save()
    print(f"{path} is written; python -m egm_lib.reports.efficiency compares it with the roofline")


def key(row: dict) -> str:
    """What tells a case from the others, of a case or of its row."""
    return json.dumps([row[field.name] for field in fields(Case)])


def in_process(*options: str) -> dict:
    """The JSON that this script prints when it is started with the options."""
    done = subprocess.run(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode == -signal.SIGKILL:
        return {"not_run": "killed by the system, as where memory runs out"}
    if done.returncode:
        return {"not_run": f"it ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def why_not(case: Case, device: str) -> str:
    """Why a case is not run here; nothing where it is."""
    need_gb = cut(shape_of(case.model), case.share).parameters * DTYPES[case.dtype].itemsize / 1e9
    if device == "cuda":
        room_gb = 0.85 * torch.cuda.get_device_properties(0).total_memory / 1e9
    else:
        room_gb = min(CPU_LIMIT_GB, 0.7 * free_gb())
    if need_gb > room_gb:
        return f"{need_gb:.1f} GB of weights, {room_gb:.0f} GB of room"
    if device == "cpu" and (case.requests > 8 or max(case.answers) >= LONG):
        return "too long on a CPU"
    return ""


def free_gb() -> float:
    """Memory that other work leaves; no limit where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    values = dict(line.split(":") for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 / 1e9


def measure(case: Case) -> dict:
    """Milliseconds of a case.

    vision_ms, prefill_ms: until the model has read the image and the prompt but for its last token;
    token_ms: of one more token, the median over the answers; total_ms: by tokens of the answer,
    whole. On a GPU also kernel_ms: how long the GPU itself works on a token; the rest of token_ms
    it waits for Python.
    """
    shape = cut(shape_of(case.model), case.share)
    device, now = clock()
    model = random_model(shape, DTYPES[case.dtype], device)
    inputs = random_inputs(model, shape, IMAGE_WH, PROMPT_TOKENS, case.requests)
    towers = {name: part for name, part in model.named_modules() if name.endswith(TOWERS)}
    vision_ms: list[float] = []
    for tower in towers.values():
        tower.register_forward_pre_hook(lambda *_: vision_ms.append(-now()))
        tower.register_forward_hook(lambda *_: vision_ms.append(now()))
    if device == "cuda":
        complete(model, read_inputs(model, inputs), 1, options(4), [])
        vision_ms.clear()
    start = now()
    prefix = read_inputs(model, inputs)
    read_ms = now() - start
    total_ms, token_ms, first_ms = {}, [], 0.0
    for tokens in (1, *case.answers):
        start = now()
        complete(model, prefix, 1, options(tokens), [])
        took = now() - start
        if tokens == 1:
            first_ms = read_ms + took
        else:
            token_ms.append(took / tokens)
            total_ms[str(tokens)] = round(read_ms + took, 1)
    kernels = {"kernel_ms": kernel_ms(model, prefix)} if device == "cuda" else {}
    return kernels | {
        "layers": shape.text.layers,
        "depth": shape.vision.depth,
        "parameters": model.num_parameters(),
        "vision_ms": round(sum(vision_ms), 1),
        "prefill_ms": round(read_ms - sum(vision_ms), 1),
        "first_token_ms": round(first_ms, 1),
        "token_ms": round(statistics.median(token_ms), 2),
        "total_ms": total_ms,
    }


def kernel_ms(model, prefix: Prefix, tokens: int = 8) -> float:
    """Milliseconds of the GPU's own work for one more token: the sum of its kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        complete(model, prefix, 1, options(tokens), [])
        torch.cuda.synchronize()
    total_us = sum(event.self_device_time_total for event in found.key_averages())
    return round(total_us / 1000 / tokens, 3)


TOWERS = ("model.visual", "model.vision_tower", "model.multi_modal_projector")


def options(tokens: int) -> SamplingOptions:
    return SamplingOptions(tokens, temperature=0.0)


def clock() -> tuple[str, Callable[[], float]]:
    """The device, and what tells its time in milliseconds."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        return "cpu", lambda: 1000 * time.process_time()

    def now() -> float:
        torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    return "cuda", now


def probe() -> dict:
    """What the device reaches, by dtype: GB/s of weights read for one row, and Gflop/s by rows."""
    device, now = clock()
    found = {}
    for dtype in ("float32", "bfloat16"):
        shape = PROBE_WEIGHTS[device]
        block = torch.randn(shape, device=device).to(DTYPES[dtype])
        weights = [block.clone() for _ in range(PROBE_LAYERS)]
        size = PROBE_LAYERS * block.numel()
        reached = {"gflops": {}}
        for rows in (1, 8, 320):
            x = torch.randn(rows, shape[1], device=device).to(DTYPES[dtype])
            times = []
            for _ in range(4 if rows < 100 else 2):
                start = now()
                for weight in weights:
                    torch.nn.functional.linear(x, weight)
                times.append(now() - start)
            seconds = min(times) / 1000
            reached["gflops"][str(rows)] = round(2 * rows * size / seconds / 1e9, 1)
            if rows == 1:
                reached["gbs"] = round(size * block.itemsize / seconds / 1e9, 2)
        found[dtype] = reached
    return found


def machine(device: str) -> dict:
    """Where it was measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    how = "wall time" if device == "cuda" else "CPU time of one thread"
    return {
        "device": device,
        "name": name,
        "time": how,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def line(row: dict) -> str:
    part = "" if row["share"] == 1 else f", 1/{row['share']} of the layers"
    head = f"{row['model']}{part}, {row['dtype']}, {row['requests']} at a time: "
    if row.get("not_run"):
        return f"{head}not run ({row['not_run']})"
    totals = ", ".join(f"{ms:,.0f} ms for {n} tokens" for n, ms in row["total_ms"].items())
    return (
        f"{head}first token {row['first_token_ms']:,.0f} ms (vision {row['vision_ms']:,.0f}), "
        f"each {row['token_ms']:,.1f} ms; {totals}"
    )


if __name__ == "__main__":
    main()
