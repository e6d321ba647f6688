"""The curation client against misbehaving services and kills; its throughput and memory.

python benchmarks/bench_curation.py [replies] [misbehave] [kills] [throughput] [dry_run] [memory];
without names, it runs all of them. Everything stays on this machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from curation_server import running  # noqa: E402
from killed_runs import CONCURRENCY, command, kills, make_samples  # noqa: E402
from reply_fuzz import fuzz  # noqa: E402

from egm_lib.curation.client import run_task  # noqa: E402
from egm_lib.curation.outputs import JsonlSamples
from egm_lib.curation.request_plan import Plan
from egm_lib.curation.tasks import TASKS  # noqa: E402
from egm_lib.profile import Price, Teacher  # noqa: E402

PRICE = Price(prompt=2.0, completion=8.0)


def misbehave(folder: Path, count: int = 2000) -> dict:
    make_samples(folder, count)
    with running("--misbehave", "1", "--delay-ms", "20") as url:
        started = time.monotonic()
        done = subprocess.run(
            command(folder, url, folder / "out.jsonl", 8.0), capture_output=True, text=True
        )
        wall_s = time.monotonic() - started
    rows = list(JsonlSamples(folder / "out.jsonl"))
    return {
        "samples": count,
        "rows": len(rows),
        "status": dict(Counter(row["status"] for row in rows)),
        "filters": dict(Counter(row["filter"] for row in rows if row["filter"])),
        "errors": dict(Counter(row["error"][:120] for row in rows if row["error"])),
        "exit": done.returncode,
        "wall_s": round(wall_s, 1),
    }


def replies(folder: Path, count: int = 100_000) -> dict:
    """Mutated replies through the one reader, which must raise nothing and keep its contract."""
    started = time.monotonic()
    finishes = fuzz(count, random.Random(1))
    return {"replies": count, "finish": finishes, "wall_s": round(time.monotonic() - started, 1)}


def throughput(folder: Path, count: int = 2000) -> dict:
    """Our client compared with a bare AsyncOpenAI loop that sends the same bodies.

    The bare loop prepares its bodies beforehand, or ("drawing") one by one, as our client does.
    """
    make_samples(folder, count)
    task = TASKS["trace"]
    samples = JsonlSamples(folder / "samples.jsonl")
    rates: dict[str, list[float]] = {}
    cpu_ms: dict[str, list[float]] = {}

    def measure(name: str, work: Callable[[], object]) -> None:
        started, cpu = time.monotonic(), time.process_time()
        work()
        rates.setdefault(name, []).append(count / (time.monotonic() - started))
        cpu_ms.setdefault(name, []).append(1000 * (time.process_time() - cpu) / count)

    with running("--delay-ms", "20") as url:
        teacher = Teacher(
            base_url=url, model="fake", temperature=0.7, max_tokens=800, concurrency=CONCURRENCY
        )
        plan = Plan(task, samples, teacher, folder)
        requests = [plan.request(sample) for sample in samples]
        bodies = [plan.body(request) | plan.sampling for request in requests]

        def drawn(number: int) -> dict:
            return plan.body(requests[number]) | plan.sampling

        for trial in range(3):
            paths = {
                "out": folder / f"{trial}.jsonl",
                "ledger": folder / f"{trial}.ledger",
                "root": folder,
            }
            measure(
                "client",
                lambda paths=paths: run_task(task, samples, teacher, progress=False, **paths),
            )
            measure("bare", lambda: asyncio.run(bare_loop(url, bodies.__getitem__, count)))
            measure("bare, drawing", lambda: asyncio.run(bare_loop(url, drawn, count)))
    result = {f"{name}: answers/s": round(max(values), 1) for name, values in rates.items()}
    result |= {
        f"{name}: CPU ms an answer": round(min(values), 2) for name, values in cpu_ms.items()
    }
    for name in ("bare", "bare, drawing"):
        result[f"ratio to {name}"] = round(max(rates["client"]) / max(rates[name]), 3)
    return result


async def bare_loop(url: str, body_of, count: int) -> None:
    numbers = iter(range(count))
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:

        async def work() -> None:
            for number in numbers:
                answer = await client.chat.completions.create(**body_of(number))
                assert answer.choices[0].message.content

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))


def measured(call: list[str]) -> dict:
    """Peak memory and CPU seconds of a command, imports included.

    It is started by a small process: a process counts, as its own peak, that of the one that
    started it, and this one is large.
    """
    code = (
        "import json, resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL); used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([used.ru_maxrss, used.ru_utime + used.ru_stime]))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, *call], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    peak_kb, cpu_s = json.loads(printed)
    return {"peak_mb": round(peak_kb / 1024), "cpu_s": round(cpu_s, 1)}


def dry_run(folder: Path, counts: tuple[int, ...] = (20_000, 100_000, 575_000)) -> dict:
    """Memory and time of `--dry-run` for growing inputs."""
    used = {}
    for count in counts:
        make_samples(folder, count, images=1)
        call = [*command(folder, "http://127.0.0.1:9/v1", folder / "out.jsonl", 1.0), "--dry-run"]
        used[count] = measured(call)
    return used


def memory(folder: Path) -> dict:
    """Memory and time of a resumed run over a finished ledger, in one process for each size."""
    used = {}
    for count in (5_750, 57_500, 575_000):
        make_samples(folder, count, images=1)
        used[count] = measured([sys.executable, __file__, "--resume", str(folder), str(count)])
    return used


def resume(folder: Path, count: int) -> None:
    """Writes a ledger that answers all samples, and resumes it."""
    task = TASKS["trace"]
    samples = JsonlSamples(folder / "samples.jsonl")
    teacher = Teacher(
        base_url="http://127.0.0.1:9/v1",
        model="fake",
        temperature=0.7,
        max_tokens=800,
        concurrency=64,
    )
    plan = Plan(task, samples, teacher, folder)
    with open(folder / "ledger.jsonl", "w", encoding="utf-8") as file:
        for sample in samples:
            record = {
                "key": plan.request(sample).key,
                "task": "trace",
                "model": "fake",
                "status": "answered",
            }
            record |= {
                "usage": {"prompt_tokens": 1, "completion_tokens": 1},
                "cost_usd": 0.0,
                "text": "the left one. " * 8,
            }
            file.write(json.dumps(record | {"finish_reason": "stop", "refusal": None}) + "\n")
    ledger, out = folder / "ledger.jsonl", folder / "out.jsonl"
    report = run_task(task, samples, teacher, out=out, ledger=ledger, root=folder, progress=False)
    assert report.dropped.total() + report.kept == count and not report.asked, report


if __name__ == "__main__":
    if sys.argv[1:2] == ["--resume"]:
        resume(Path(sys.argv[2]), int(sys.argv[3]))
        sys.exit()
    benches = {
        bench.__name__: bench for bench in (replies, misbehave, kills, throughput, dry_run, memory)
    }
    for name in sys.argv[1:] or benches:
        with tempfile.TemporaryDirectory() as folder:
            print(name, json.dumps(benches[name](Path(folder)), indent=2), flush=True)
