"""Evaluation of the miniature by several processes, each on a shard of the samples, against one.

    python benchmarks/bench_shards.py [--model data/mini/small] [--samples 1000] [--workers 2]

Processes have one thread each, and their start is part of the time. One process and several take
turns, since other work may run on the machine. The CPU seconds of the busiest process are what a
machine with nothing else to do would take. The merged file is compared with that of one
process, byte for byte.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from egm_lib.data import read_samples
from egm_lib.files import read_jsonl
from egm_lib.inference.predict import predict
from egm_lib.inference.shards import Shard
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.mini.world import write_split
from egm_lib.profile import load_profile


def answer(root: Path, model: Path, out: Path, shard: Shard) -> None:
    """What one process does."""
    profile = load_profile("mini")
    engine = TransformersEngine(model, "qwen3-vl", batch_size=profile.generation.batch_size)
    predict(
        read_samples(root / "validation.jsonl"),
        engine,
        out=out,
        model="small-base",
        profile="bench",
        seed=0,
        root=root,
        sampling=profile.generation.sampling,
        shard=shard,
    )


def timed(root: Path, model: Path, out: Path, workers: int) -> tuple[float, float]:
    """Seconds until `workers` processes have written `out`, and CPU seconds of the busiest one."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--model", str(model), "--root", str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, "--out", str(out), "--shard", f"{number}/{workers}"],
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        for number in range(1, workers + 1)
    ]
    ends = [os.wait4(process.pid, 0) for process in processes]
    if any(status for _, status, _ in ends):
        raise SystemExit("a process failed")
    busiest_s = max(usage.ru_utime + usage.ru_stime for _, _, usage in ends)
    return time.perf_counter() - start, busiest_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("data/mini/small"))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=Shard.parse, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.shard is not None:
        answer(args.root, args.model, args.out, args.shard)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        write_split(root, "validation.jsonl", args.samples)
        for number in range(args.rounds):
            for workers in (1, args.workers):
                out = root / f"{workers}-{number}.jsonl"
                seconds, busiest_s = timed(root, args.model, out, workers)
                print(
                    f"{workers} processes: {seconds:.1f} s, {busiest_s:.1f} s of CPU in one",
                    flush=True,
                )
        one, several = (root / f"{workers}-0.jsonl" for workers in (1, args.workers))
        same = one.read_bytes() == several.read_bytes()
        pairs = zip(read_jsonl(one), read_jsonl(several), strict=True)
        differing = sum(first != second for first, second in pairs)
        print(f"{args.samples} rows, {differing} differ; the files are equal: {same}")


if __name__ == "__main__":
    main()
