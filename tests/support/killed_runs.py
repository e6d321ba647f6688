"""A curation run that is killed again and again, and an undisturbed one. Loopback only."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from curation_server import running
from PIL import Image
from tqdm import tqdm

from egm_lib.curation.outputs import JsonlSamples

CONCURRENCY = 64


def make_samples(folder: Path, count: int, images: int = 50) -> Path:
    """A data root with noise images of COCO's size and `count` samples."""
    rng = random.Random(0)
    for number in range(images):
        noise = Image.frombytes("RGB", (64, 48), rng.randbytes(64 * 48 * 3)).resize((640, 480))
        noise.save(folder / f"{number}.jpg")
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            sample = {
                "sample_id": f"s{number}",
                "dataset": "refcoco",
                "split": "train",
                "task": "vanilla",
            }
            sample |= {
                "image": f"{number * images // count}.jpg",
                "width": 640,
                "height": 480,
                "image_id": "0",
            }
            sample |= {
                "expression": f"number {number} from the left",
                "gt_box": [100, 100, 200, 250],
            }
            file.write(json.dumps(sample) + "\n")
    return folder / "samples.jsonl"


def command(folder: Path, url: str, out: Path, timeout_s: float) -> list[str]:
    files = ["--input", str(folder / "samples.jsonl"), "--output", str(out)]
    asked = ["--base-url", url, "--model", "fake", "--concurrency", str(CONCURRENCY)]
    limits = ["--timeout", str(timeout_s), "--price", "2", "8"]
    return [sys.executable, "-m", "egm_lib.curation", "trace", *files, *asked, *limits]


def paid(log: Path) -> Counter[str]:
    """Answers charged, by sample."""
    return Counter(line.split()[0] for line in log.read_text().splitlines())


def kills(folder: Path, count: int = 2000, number: int = 20) -> dict:
    """Kill a run at random moments, resume it each time, and compare it with an undisturbed run."""
    make_samples(folder, count)
    rng, log, ledger = random.Random(1), folder / "paid.log", folder / "out.ledger.jsonl"
    lost, marks = 0, []
    with running("--delay-ms", "600", "--log", str(log)) as url:
        call = command(folder, url, folder / "out.jsonl", 30.0)
        for _ in tqdm(range(number), mininterval=10):
            before = answered(ledger)
            process = subprocess.Popen(call, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            # Kill it while it works, not while it starts
            while not ledger.exists() or answered(ledger) <= before:
                time.sleep(0.01)
                if process.poll() is not None:
                    break
            time.sleep(rng.uniform(0.0, 0.8))
            process.send_signal(signal.SIGKILL)
            process.wait()
            lost += len(before - answered(ledger))
            time.sleep(0.2)  # the server logs the requests that were still on their way
            marks.append((len(log.read_text().splitlines()), answered(ledger)))
        finished = subprocess.run(call, capture_output=True, text=True)
        charged = paid(log)
        lines = [line.split()[0] for line in log.read_text().splitlines()]
        again = sum(sample_id in had for at, had in marks for sample_id in lines[at:])
        calm = subprocess.run(
            command(folder, url, folder / "calm.jsonl", 30.0), capture_output=True
        )
    disturbed, undisturbed = (
        sorted(map(json.dumps, JsonlSamples(folder / name))) for name in ("out.jsonl", "calm.jsonl")
    )
    return {
        "samples": count,
        "kills": number,
        "answers_lost": lost,
        "asked_although_answered": again,
        "paid_twice": sum(charged.values()) - len(charged),
        "most_in_flight_at_kills": CONCURRENCY * number,
        "paid_most_often": max(charged.values()),
        "identical": disturbed == undisturbed,
        "exit": [finished.returncode, calm.returncode],
    }


def answered(ledger: Path) -> set[str]:
    """Samples that the whole lines of a ledger answer."""
    if not ledger.exists():
        return set()
    whole = ledger.read_bytes().rpartition(b"\n")[0].split(b"\n")
    return {
        record["sample_id"]
        for record in map(json.loads, filter(None, whole))
        if record["status"] == "answered"
    }
