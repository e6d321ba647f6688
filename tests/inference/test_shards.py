"""Shards of a prediction file: killed and resumed, merged they are what one process writes."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from engine_world import GREEDY, FakeEngine, sample
from tiny_qwen import tiny_qwen

from egm_lib.errors import InputError
from egm_lib.inference.predict import EngineFailure, predict
from egm_lib.inference.shards import Shard, files_with_rows
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.prompts import FAMILIES

SAMPLES = [sample(number) for number in range(50)]
STAMP = {"model": "small-base", "profile": "test", "seed": 0}
PATIENCE_S = 400.0


def run(engine, root, out, shard="1/1", samples=SAMPLES, **options):
    common = {**STAMP, "root": root, "sampling": GREEDY, "shard": Shard.parse(shard), **options}
    predict(samples, engine, out=out, **common)
    return engine


class Killed(FakeEngine):
    """Is interrupted after some answers, as by a scheduler."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def answer(self, requests, sampling, *, reasoning=True):
        for answer in super().answer(requests, sampling, reasoning=reasoning):
            if self.asked > self.after:
                raise KeyboardInterrupt
            yield answer


def killed_and_torn(root, out, shard):
    """A shard that has some rows, and half a line."""
    with pytest.raises(KeyboardInterrupt):
        run(Killed(after=10), root, out, shard)
    file = Shard.parse(shard).file(out)
    with open(file, "a") as rows:
        rows.write('{"sample_id": "s')


@pytest.mark.parametrize("count", [2, 3, 60])
def test_shards_killed_and_resumed_merge_to_the_file_of_one_process(images, count):
    """60: more shards than samples, so that some are empty."""
    whole, out = images / "whole.jsonl", images / "shared.jsonl"
    run(FakeEngine(), images, whole)
    shards = [f"{number}/{count}" for number in range(1, count + 1)]
    if count == 2:
        for shard in shards:
            killed_and_torn(images, out, shard)
    engines = [run(FakeEngine(), images, out, shard) for shard in shards]
    assert out.read_bytes() == whole.read_bytes()
    assert files_with_rows(out) == [out] and list(images.glob("*.unfinished")) == []
    if count == 2:  # a window of 8 was kept by each
        assert [engine.asked for engine in engines] == [17, 17]


def test_an_unfinished_shard_is_named_with_what_it_lacks(images, capsys):
    out = images / "out.jsonl"
    killed_and_torn(images, out, "2/3")
    run(FakeEngine(), images, out, "1/3")
    said = capsys.readouterr().out
    assert "shard 1/3 is done; unfinished: 2/3 (8 of 17 samples), 3/3 (0 of 16 samples)" in said
    assert not out.exists()


def test_shards_are_alike(images):
    """Round robin: each has samples of all images and lengths."""
    for number in (1, 2):
        part = Shard(number, 2).of(SAMPLES)
        assert len(part) == 25 and {row["image"] for row in part} == {"0.png", "1.png", "2.png"}
    assert sorted(
        row["sample_id"] for number in (1, 2, 3) for row in Shard(number, 3).of(SAMPLES)
    ) == sorted(row["sample_id"] for row in SAMPLES)


@pytest.mark.parametrize("before, after", [("1/1", "2"), ("1/2", "1"), ("1/2", "4")])
def test_another_number_of_processes_keeps_what_is_finished(images, before, after):
    """A run that begins on eight GPUs may go on with four, or with one."""
    whole, out = images / "whole.jsonl", images / "out.jsonl"
    run(FakeEngine(), images, whole)
    with pytest.raises(KeyboardInterrupt):
        run(Killed(after=18), images, out, before)
    asked = sum(
        run(FakeEngine(), images, out, f"{number}/{after}").asked
        for number in range(1, int(after) + 1)
    )
    assert out.read_bytes() == whole.read_bytes()
    assert asked <= 50  # a window with a missing sample is asked whole
    assert list(images.glob("*.unfinished")) == []


def test_a_finished_file_is_not_asked_again_by_a_shard(images):
    out = images / "out.jsonl"
    run(FakeEngine(), images, out)
    before = out.read_bytes()
    assert run(FakeEngine(), images, out, "1/2").asked == 0
    assert out.read_bytes() == before and list(images.glob("*.unfinished")) == []


def test_shards_ask_again_where_a_row_is_an_error(images):
    out = images / "out.jsonl"
    prompts = {FAMILIES["qwen3-vl"].prompt(SAMPLES[3]["expression"], "vanilla")}
    run(FakeEngine(lambda prompt: prompt in prompts), images, out)
    failed = [json.loads(line)["status"] for line in out.read_text().splitlines()].count("error")
    assert failed > 0
    run(FakeEngine(), images, out, "2/2", retry_errors=True)
    assert out.read_text().count('"status": "error"') == failed  # the other shard is not finished
    run(FakeEngine(), images, out, "1/2", retry_errors=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in SAMPLES]
    assert all(row["status"] == "ok" for row in rows)


def test_rows_of_another_model_are_not_merged(images):
    out = images / "out.jsonl"
    run(FakeEngine(), images, out, "1/2")
    with pytest.raises(InputError, match="written for model 'small-base'"):
        run(FakeEngine(), images, out, "2/2", model="large-base")
    assert not out.exists()


def test_an_engine_that_fails_everywhere_stops_its_shard(images):
    with pytest.raises(EngineFailure, match="no memory"):
        run(FakeEngine(lambda prompt: True), images, images / "out.jsonl", "1/2")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2", ""])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write I/N, such as 1/2"):
        Shard.parse(text)


def test_a_model_s_answers_do_not_depend_on_the_shards(images):
    """float32 and greedy, though every sample is in another batch than before."""
    model, processor = tiny_qwen()
    engine = TransformersEngine(
        model, "qwen3-vl", "float32", batch_size=4, processor=processor, device="cpu"
    )
    whole, out = images / "whole.jsonl", images / "out.jsonl"
    short = replace(GREEDY, max_new_tokens=16)
    run(engine, images, whole, samples=SAMPLES[:24], sampling=short)
    for shard in ("2/2", "1/2"):
        run(engine, images, out, shard, samples=SAMPLES[:24], sampling=short)
    assert out.read_bytes() == whole.read_bytes()
    assert len({json.loads(line)["raw_answer"] for line in out.read_text().splitlines()}) > 3


SLOW_SHARD = """
import sys, time
from pathlib import Path
from engine_world import GREEDY, FakeEngine, sample
from egm_lib.inference.predict import predict
from egm_lib.inference.shards import Shard

class Slow(FakeEngine):
    def answer(self, requests, sampling, *, reasoning=True):
        if self.asked:
            time.sleep(float(sys.argv[2]))
        yield from super().answer(requests, sampling, reasoning=reasoning)

root = Path(sys.argv[1])
predict([sample(number) for number in range(50)], Slow(), out=root / "out.jsonl", root=root,
        model="small-base", profile="test", seed=0, sampling=GREEDY,
        shard=Shard.parse(sys.argv[3]))
"""


def test_processes_that_are_killed_and_started_again_write_one_whole_file(images):
    """SIGKILL after the first window; the second time both run to their end at once."""

    def start(shard, seconds):
        command = [sys.executable, "-c", SLOW_SHARD, str(images), str(seconds), shard]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    whole, out = images / "whole.jsonl", images / "out.jsonl"
    run(FakeEngine(), images, whole)
    running = [start(shard, PATIENCE_S) for shard in ("1/2", "2/2")]
    deadline, files = time.monotonic() + PATIENCE_S, [Shard(n, 2).file(out) for n in (1, 2)]
    while not all(file.is_file() and file.read_text().count("\n") == 8 for file in files):
        assert time.monotonic() < deadline
        assert [process.poll() for process in running] == [None, None]
        time.sleep(0.1)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    running = [start(shard, 0.0) for shard in ("1/2", "2/2")]
    assert [process.wait(timeout=PATIENCE_S) for process in running] == [0, 0]
    assert out.read_bytes() == whole.read_bytes()
