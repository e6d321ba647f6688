"""The client against a local server and the miniature teacher: nothing lost, nothing paid twice, no
key leaked.
"""

import asyncio
import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import httpx2
import openai
import pytest
from curation_server import reply_text, running
from killed_runs import kills
from PIL import Image

from egm_lib.curation import batch, client
from egm_lib.curation import templates as prompts
from egm_lib.curation.__main__ import main
from egm_lib.curation.client import estimate, run_task
from egm_lib.curation.outputs import (
    JsonlSamples,
    examples,
    filter_quality,
    kept,
    kept_and_dropped,
)
from egm_lib.curation.request_plan import Plan
from egm_lib.curation.services import CurationError, Refused
from egm_lib.curation.tasks import TASKS, messages
from egm_lib.mini.teacher import TeacherTransport
from egm_lib.profile import Price, ProfileError, Teacher

PRICE = Price(prompt=1.0, completion=1.0)


def teacher(base_url="mini", model="mini-teacher", **more):
    values = {
        "temperature": 0.7,
        "max_tokens": 800,
        "concurrency": 8,
        "price_per_mtok": PRICE,
    } | more
    return Teacher(base_url=base_url, model=model, **values)


def make_root(folder: Path, count: int) -> list[dict]:
    """A data root: images, samples, and what the teacher knows of them."""
    (folder / "images").mkdir(exist_ok=True)
    for number in range(4):
        Image.new("RGB", (128, 96), (60 * number, 90, 90)).save(folder / f"images/{number}.png")
    samples, truths = [], []
    for number in range(count):
        sample = {
            "sample_id": f"s{number}",
            "dataset": "refcoco",
            "split": "train",
            "task": "amodal",
            "flipped": False,
        }
        sample |= {
            "image": f"images/{number % 4}.png",
            "width": 128,
            "height": 96,
            "image_id": str(number % 4),
        }
        sample |= {"expression": f"red circle {number}", "gt_box": [20.0, 20.0, 60.0, 60.0]}
        samples.append(
            sample | {"modal_box": [20.0, 20.0, 60.0, 45.0], "box": [70.0, 20.0, 110.0, 60.0]}
        )
        truth = {
            "sample_id": f"s{number}",
            "verify": "NO" if number % 5 == 0 else "YES",
            "planted_cause": None,
        }
        truth |= {"reasoning": "two red circles : 1 at 825 300 , 2 at 750 850 . it is 2 ."}
        truth |= {"amodal_expression": f"second red circle {number}", "gt_box": [20, 20, 60, 60]}
        truth |= {
            "amodal_reasoning": "a log hides the circle. it extends downward from the visible "
            "part moderately."
        }
        truths.append(truth | {"lookalike_boxes_px": [[70, 20, 110, 60]]})
    for name, rows in (("samples", samples), ("teacher", truths)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return samples


@pytest.fixture
def run(tmp_path):
    """run(task, samples, **options): a quiet run in tmp_path."""

    def run(name, samples, service=None, **options):
        paths = {
            "out": tmp_path / f"{name}.out.jsonl",
            "ledger": tmp_path / "ledger.jsonl",
            "root": tmp_path,
        }
        return run_task(
            TASKS[name], samples, service or teacher(), progress=False, **(paths | options)
        )

    run.out = lambda name: tmp_path / f"{name}.out.jsonl"
    run.rows = lambda name: list(JsonlSamples(run.out(name)))
    return run


def cli(folder, url, *more, task="trace", **options):
    words = [
        task,
        "--input",
        folder / "samples.jsonl",
        "--output",
        folder / "out.jsonl",
        "--base-url",
        url,
    ]
    command = [sys.executable, "-m", "egm_lib.curation", *words, "--model", "fake", *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def test_every_task_is_answered_and_the_stages_chain(tmp_path, run):
    samples = make_root(tmp_path, 60)
    run("amodal-expression", samples)
    expressed = list(kept(samples, run.out("amodal-expression"), "expression"))
    assert 0 < len(expressed) < 60 and expressed[0]["expression"].startswith("second red circle")
    report = run("verify", expressed)
    assert report.dropped == {
        "rejected": sum(int(sample["sample_id"][1:]) % 5 == 0 for sample in expressed)
    }
    verified = list(kept(expressed, run.out("verify"), "verdict"))
    assert all(sample["verdict"] == "YES" for sample in verified)
    assert run("amodal-trace", verified).kept > 0
    traced = list(kept(verified, run.out("amodal-trace"), "reasoning"))
    assert {sample["reasoning"] for sample in traced} == {
        "a log hides the circle. it extends downward from the visible part moderately."
    }
    judged = run("failure", samples, teacher(model="a perfect judge"))
    assert judged.kept == 60
    assert (
        Counter(row["answer"] for row in run.rows("failure")).most_common(1)[0][0]
        == "COMPLEX-PROMPT"
    )


def test_the_filters_catch_the_teachers_planted_errors(tmp_path, run):
    samples = make_root(tmp_path, 400)
    run("trace", samples, skip_filters=["coordinates", "too-many-sentences"])
    run("amodal-trace", samples)
    eye = TeacherTransport(tmp_path / "teacher.jsonl")
    for task in ("trace", "amodal-trace"):
        planted = {
            sample["sample_id"]: eye.planted_error(sample["sample_id"], task) for sample in samples
        }
        assert set(planted.values()) == {*eye.error_rates[task], None}  # every kind occurs
        quality = filter_quality(run.out(task), planted)
        assert quality.loc["any", "precision"] == quality.loc["any", "recall"] == 1.0, quality


def test_the_teachers_errors_come_at_their_rates(tmp_path):
    make_root(tmp_path, 1)
    eye = TeacherTransport(
        tmp_path / "teacher.jsonl", error_rates={"trace": {"refusal": 0.1, "truncated": 0.2}}
    )
    kinds = Counter(eye.planted_error(f"s{number}", "trace") for number in range(5000))
    assert abs(kinds["refusal"] / 5000 - 0.1) < 0.02 and abs(kinds["truncated"] / 5000 - 0.2) < 0.02


def test_the_failure_judge_looks_at_the_prediction(tmp_path, run):
    samples = make_root(tmp_path, 4)
    truths = [json.loads(line) for line in (tmp_path / "teacher.jsonl").read_text().splitlines()]
    samples[1]["box"] = None  # no box at all: no look-alike was hit
    samples[2]["box"] = None
    samples[2]["gt_box"] = truths[2]["gt_box"] = [10.0, 10.0, 14.0, 14.0]  # 16 px of 12,288
    truths[3]["planted_cause"] = "GT-ERROR"
    (tmp_path / "teacher.jsonl").write_text("".join(json.dumps(truth) + "\n" for truth in truths))
    unerring = TeacherTransport(tmp_path / "teacher.jsonl", confusion_rates={"j": 0.0})
    causes = [
        unerring.answer("failure", t, TASKS["failure"].prompt(s), "j")[0]
        for s, t in zip(samples, truths, strict=True)
    ]
    assert causes == ["COMPLEX-PROMPT", "OTHER", "SMALL-OBJECT", "GT-ERROR"]


def test_kept_and_dropped_table_and_examples(tmp_path, run):
    run("verify", make_root(tmp_path, 20))
    table = kept_and_dropped(run.out("verify"))["verify (mini-teacher)"]
    assert table["kept"] == 16 and table["rejected"] == 4
    shown = examples(run.out("verify"), count=2)
    assert Counter(shown["reason"]) == {"kept": 2, "rejected": 2}


def test_the_image_is_marked_in_green_and_the_rest_is_left_alone(tmp_path):
    import base64
    import io

    sample = make_root(tmp_path, 1)[0]
    content = messages(TASKS["trace"], sample, tmp_path / sample["image"])[0]["content"]
    data = base64.b64decode(content[0]["image_url"]["url"].split(",")[1])
    image = Image.open(io.BytesIO(data))
    assert image.size == (128, 96)
    red, green, blue = image.getpixel((22, 40))  # on the left edge of the box, 5 px wide
    assert green > 100 and red < 60 and blue < 60
    assert abs(image.getpixel((40, 40))[1] - 90) < 12  # inside it
    # The label, white above the box
    assert image.crop((20, 2, 90, 19)).convert("L").getextrema()[1] > 150
    assert "[156, 208, 468, 624]" in content[1]["text"]  # 0..999


def test_a_image_of_another_size_fails_alone(tmp_path, run):
    samples = make_root(tmp_path, 3)
    samples[1]["width"] = 130
    samples[2]["image"] = "images/none.png"
    report = run("verify", samples)
    assert report.failed == 2 and report.asked == 1
    errors = [row["error"] for row in run.rows("verify")]
    assert "130 x 96" in errors[1] and "none.png" in errors[2]


def test_the_key_follows_everything_that_is_sent(tmp_path, monkeypatch):
    sample = make_root(tmp_path, 1)[0]

    def key(task="trace", sample=sample, **more):
        return Plan(TASKS[task], [], teacher(**more), tmp_path).request(sample).key

    first = key()
    # How fast we ask is no part of the question
    assert key() == first and key(concurrency=3) == first
    others = [key("amodal-trace"), key(model="other"), key(temperature=0.1), key(max_tokens=9)]
    others += [
        key(sample=sample | change)
        for change in ({"expression": "x"}, {"gt_box": [1, 1, 9, 9]}, {"sample_id": "t"})
    ]
    Image.new("RGB", (128, 96), "white").save(tmp_path / sample["image"])
    others.append(key())  # the image's content
    changed = dataclasses.replace(TASKS["trace"], template=prompts.TRACE + " Please.")
    monkeypatch.setitem(TASKS, "trace", changed)
    others.append(key())
    assert len({first, *others}) == 1 + len(others)


def test_answered_samples_are_not_asked_again_and_filters_rerun_for_nothing(tmp_path, run):
    samples = make_root(tmp_path, 30)
    assert run("trace", samples[:20]).asked == 20
    assert run("trace", samples).asked == 10
    assert run("trace", samples).kept == 0  # the traces hold places
    again = run("trace", samples, skip_filters=["coordinates", "too-many-sentences"])
    assert again.asked == 0 and again.kept > 20


def test_a_sample_that_comes_twice_is_paid_once(tmp_path, run):
    samples = make_root(tmp_path, 5) * 3
    report = run("verify", samples)
    assert report.asked == 5 and len(run.rows("verify")) == 15


def test_the_budget_is_never_passed_and_a_larger_one_goes_on(tmp_path, run):
    samples = make_root(tmp_path, 60)
    full = run("trace", samples, ledger=tmp_path / "full.jsonl").cost_usd
    first = run("trace", samples, budget_usd=full / 2)
    assert 0 < first.cost_usd <= full / 2 and first.waiting and "budget" in first.stopped
    assert len(run.rows("trace")) == 60 - first.waiting
    again = run("trace", samples, budget_usd=full / 2)  # what the ledger has paid counts
    assert first.cost_usd + again.cost_usd <= full / 2
    last = run("trace", samples, budget_usd=full * 2)
    assert last.waiting == 0 and first.cost_usd + again.cost_usd + last.cost_usd == pytest.approx(
        full
    )


def test_a_budget_without_a_price_is_refused(tmp_path, run):
    with pytest.raises(CurationError, match="price"):
        run("trace", make_root(tmp_path, 1), teacher(price_per_mtok=None), budget_usd=1.0)


def test_the_estimate_asks_nothing_and_learns_from_the_ledger(tmp_path, run):
    samples = make_root(tmp_path, 60)
    paths = {"ledger": tmp_path / "ledger.jsonl", "root": tmp_path}
    before = estimate(TASKS["trace"], samples, teacher(), **paths)
    assert (
        before.requests == 60
        and not paths["ledger"].exists()
        and before.cost_usd < before.at_most_usd
    )
    done = run("trace", samples[:30])
    after = estimate(TASKS["trace"], samples, teacher(), **paths)
    assert after.requests == 30 and after.cost_usd == pytest.approx(done.cost_usd, rel=0.1)
    assert estimate(
        TASKS["trace"], samples, teacher(), batch=True, **paths
    ).cost_usd == pytest.approx(after.cost_usd / 2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gt_box": None}, "no 'gt_box'"),
        ({"gt_box": [5, 5, 1, 9]}, "is no box"),
        ({"modal_box": None}, "no 'modal_box', which amodal-trace needs"),
        ({"sample_id": 7}, "sample_id = 7 is no str"),
        ({"width": "128"}, "width = '128' is no int"),
    ],
)
def test_bad_input_is_named_before_anything_is_paid(tmp_path, run, change, words):
    samples = make_root(tmp_path, 3)
    samples[2] |= change
    with pytest.raises(CurationError, match=f"sample 3.*{words}"):
        run("amodal-trace", samples)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_misbehaving_server_leaves_an_answer_or_a_listed_failure(tmp_path, run):
    samples = make_root(tmp_path, 150)
    with running("--misbehave", "0.7", "--seed", "3", "--log", str(tmp_path / "paid.log")) as url:
        report = run("trace", samples, teacher(url, concurrency=32), timeout_s=6.0)
    rows = run.rows("trace")
    assert [row["sample_id"] for row in rows] == [sample["sample_id"] for sample in samples]
    assert all(row["status"] != "failed" or row["error"] for row in rows)
    assert all(
        row["answer"] == reply_text(row["sample_id"]) for row in rows if row["status"] == "ok"
    )
    assert (
        report.kept > 100
        and report.dropped["empty"] + report.dropped["refusal"] > 0
        and report.unreadable > 0
    )


def test_killed_and_resumed_loses_nothing_and_pays_once(tmp_path):
    make_root(tmp_path, 200)
    log, ledger = tmp_path / "paid.log", tmp_path / "out.ledger.jsonl"
    with running("--delay-ms", "150", "--log", str(log)) as url:
        words = f"trace --input {tmp_path}/samples.jsonl --output {tmp_path}/out.jsonl"
        words += f" --base-url {url} --model fake"
        command = [sys.executable, "-m", "egm_lib.curation", *words.split(), "--concurrency", "8"]
        for _ in range(3):
            had = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
            process = subprocess.Popen(
                command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            while process.poll() is None and (
                not ledger.exists() or ledger.read_bytes().count(b"\n") < had + 10
            ):
                time.sleep(0.02)
            process.kill()
            process.wait()
            answered = {
                json.loads(line)["sample_id"]
                for line in ledger.read_bytes().splitlines(keepends=True)
                if line[-1:] == b"\n"
            }
            assert len(answered) >= had + 10
        assert not (tmp_path / "out.jsonl").exists()  # nothing half-written
        assert subprocess.run(command, capture_output=True).returncode == 0
    paid = Counter(line.split()[0] for line in log.read_text().splitlines())
    # At most those in flight at a kill
    assert len(paid) == 200 and sum(paid.values()) - 200 <= 3 * 8
    rows = list(JsonlSamples(tmp_path / "out.jsonl"))
    assert [row["answer"] for row in rows] == [reply_text(f"s{number}") for number in range(200)]


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    """2,000 requests at concurrency 64, as the benchmark makes and counts them."""
    found = kills(tmp_path)
    assert found["answers_lost"] == found["asked_although_answered"] == 0
    assert found["paid_twice"] <= found["most_in_flight_at_kills"]
    assert found["identical"] and found["exit"] == [0, 0]


def test_ctrl_c_ends_the_requests_under_way_and_keeps_them(tmp_path):
    make_root(tmp_path, 100)
    log = tmp_path / "paid.log"
    with running("--delay-ms", "300", "--log", str(log)) as url:
        words = f"trace --input {tmp_path}/samples.jsonl --output {tmp_path}/out.jsonl"
        words += f" --base-url {url} --model fake"
        command = [sys.executable, "-m", "egm_lib.curation", *words.split(), "--concurrency", "4"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not log.read_text():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 4
    rows = list(JsonlSamples(tmp_path / "out.jsonl"))
    # Every answer that was paid is there
    assert len(rows) == len(log.read_text().splitlines()) < 100


def service(handler, monkeypatch):
    """Let `connect` give a client whose requests a function answers."""

    def connect(base_url, key, **_):
        http_client = httpx2.AsyncClient(transport=httpx2.MockTransport(handler))
        return openai.AsyncOpenAI(
            base_url=base_url, api_key=key, max_retries=0, http_client=http_client
        )

    monkeypatch.setattr(client, "connect", connect)
    return teacher("http://127.0.0.1:9/v1")


def test_a_wrong_key_stops_at_once_and_an_odd_sample_does_not(tmp_path, run, monkeypatch):
    samples, asked = make_root(tmp_path, 200), []

    def handler(request):
        asked.append(request.headers["X-EGM-Sample"])
        status = 401 if len(asked) > 20 else 400
        return httpx2.Response(status, json={"error": {"message": "no"}})

    with pytest.raises(Refused, match="refuses"):
        run("trace", samples, service(handler, monkeypatch))
    assert 20 < len(asked) < 20 + 16
    assert {row["status"] for row in run.rows("trace")} == {"failed"} and len(
        run.rows("trace")
    ) == 20


@pytest.mark.parametrize(
    "body, status",
    [
        # No usage
        (
            {"choices": [{"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}]},
            "filtered",
        ),
        # In parts
        (
            {
                "choices": [{"message": {"content": [{"type": "text", "text": "left."}]}}],
                "usage": {},
            },
            "ok",
        ),
        (
            {"choices": [{"message": {"content": "half \ud83d of a pair"}}]},
            "ok",
        ),  # a lone surrogate
        ({"error": {"message": "with status 200"}}, "failed"),
        ({"choices": []}, "failed"),
        ([], "failed"),
    ],
)
def test_odd_completions(tmp_path, run, monkeypatch, body, status):
    async def at_once(_):
        return None

    monkeypatch.setattr(client.asyncio, "sleep", at_once)
    monkeypatch.setattr(client._Asker, "_sync", at_once)
    answering = service(
        lambda request: httpx2.Response(200, content=json.dumps(body).encode()), monkeypatch
    )
    run("trace", make_root(tmp_path, 1), answering)
    assert [row["status"] for row in run.rows("trace")] == [status]


def test_a_run_works_inside_a_running_event_loop(tmp_path, run):
    """Notebooks have one."""

    async def cell():
        return run("verify", make_root(tmp_path, 10))

    assert asyncio.run(cell()).kept == 8


def test_the_key_appears_nowhere(tmp_path, run, monkeypatch, caplog, capsys):
    """Even where the service echoes it in answers and errors, and every logger talks."""
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    caplog.set_level(logging.DEBUG)
    samples, seen = make_root(tmp_path, 12), []

    def handler(request):
        seen.append(request.headers["Authorization"])
        kind = len(seen) % 3
        if kind == 0:
            return httpx2.Response(400, json={"error": {"message": f"bad key {secret}?"}})
        if kind == 1:
            return httpx2.Response(200, text=f"<html>{secret}")
        choice = {"message": {"content": f"left, {secret}"}, "finish_reason": "stop"}
        return httpx2.Response(200, json={"id": secret, "choices": [choice]})

    run("trace", samples, service(handler, monkeypatch), limit=11)
    assert all(secret in header for header in seen)
    with pytest.raises(Refused) as refused:
        wrong = service(
            lambda _: httpx2.Response(401, json={"error": {"message": f"key {secret} wrong"}}),
            monkeypatch,
        )
        run("trace", samples, wrong)
    told = (
        caplog.text
        + "".join(capsys.readouterr())
        + "".join(traceback.format_exception(refused.value))
    )
    files = [path for path in tmp_path.rglob("*.jsonl*") if path.is_file()]
    assert len(files) >= 3
    assert secret not in told and not any(secret in path.read_text() for path in files)


def test_the_key_comes_from_the_environment_only(tmp_path, run, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ProfileError, match="set the environment variable OPENAI_API_KEY"):
        run("trace", make_root(tmp_path, 1), teacher("https://api.example.com/v1"))
    with pytest.raises(ProfileError, match="no such name") as misplaced:
        run(
            "trace",
            make_root(tmp_path, 1),
            teacher("https://api.example.com/v1", api_key_env="sk-secret"),
        )
    assert "secret" not in str(misplaced.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-company")
    with pytest.raises(ProfileError, match="set the environment variable GEMINI_API_KEY"):
        run(
            "trace",
            make_root(tmp_path, 1),
            teacher("https://api.example.com/v1", api_key_env="GEMINI_API_KEY"),
        )
    with pytest.raises(CurationError, match="keys belong in the environment"):
        run("trace", make_root(tmp_path, 1), teacher("http://me:sk-1@localhost/v1"))


def test_command_line(tmp_path):
    make_root(tmp_path, 12)
    secret = "sk-very-secret-0123456789"
    environment = os.environ | {"OPENAI_API_KEY": secret, "OPENAI_LOG": "debug"}
    with running() as url:
        dry = cli(tmp_path, url, "--dry-run", env=environment)
        assert (
            dry.returncode == 0
            and "12 requests" in dry.stdout
            and not (tmp_path / "out.jsonl").exists()
        )
        some = cli(tmp_path, url, "--limit", "5", "--concurrency", "2", env=environment)
        assert some.returncode == 0 and "kept" in some.stdout
        rows = list(JsonlSamples(tmp_path / "out.jsonl"))
        assert len(rows) == 5 and all(
            row["status"] == "ok" and row["usage"] and row["answer"] for row in rows
        )
        poor = cli(tmp_path, url, "--budget", "0.0000001", env=environment)
        assert poor.returncode == 4 and "budget" in poor.stdout
    (tmp_path / "images/3.png").write_bytes(b"no image")
    with running() as url:
        some_fail = cli(tmp_path, url, env=environment)
    assert some_fail.returncode == 3 and "s7" in some_fail.stdout
    assert Counter(row["status"] for row in JsonlSamples(tmp_path / "out.jsonl")) == {
        "ok": 9,
        "failed": 3,
    }
    for done in (dry, some, poor, some_fail):
        assert secret not in done.stdout + done.stderr
    missing = cli(tmp_path / "none", "http://127.0.0.1:9/v1")
    assert missing.returncode == 2 and re.search("no file .*samples.jsonl", missing.stderr)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--output", "samples.jsonl"], "is the input"),
        (["--output", "out.jsonl", "--ledger", "samples.jsonl"], "is the input"),
        (["--output", "out.jsonl", "--ledger", "out.jsonl"], "it is the ledger"),
        (["--output", "images"], "it is a folder"),
        (["--output", "out.jsonl", "--ledger", "teacher.jsonl"], "teacher.jsonl is no ledger"),
        (["--output", "out.jsonl", "--ledger", "images"], "images"),
        (["--output", "samples.jsonl/out.jsonl"], "cannot write samples.jsonl/out"),
    ],
)
def test_no_file_of_the_users_is_overwritten(tmp_path, monkeypatch, capsys, words, reason):
    make_root(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    address = ["--base-url", "mini", "--model", "m", "--price", "1", "1"]
    assert main(["verify", "--input", "samples.jsonl", *address, *words]) == 2
    assert reason in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
    assert {path: path.read_bytes() for path in before} == before


class BatchService:
    """OpenAI's files and batches, in a dict. Polls until done: one; lines that fail: those whose
    number is in `bad`.
    """

    def __init__(self):
        self.files, self.batches, self.polls, self.die_after_create = {}, {}, Counter(), False

    def __call__(self, request):
        path, method = request.url.path, request.method
        if path == "/v1/files":
            body = request.content
            name = f"file-{len(self.files)}"
            part = next(
                part
                for part in body.split(b"\r\n\r\n")
                if part.lstrip().startswith(b'{"custom_id"')
            )
            self.files[name] = part.rpartition(b"\r\n--")[0] or part
            return httpx2.Response(
                200,
                json={
                    "id": name,
                    "object": "file",
                    "bytes": 1,
                    "created_at": 0,
                    "filename": "x",
                    "purpose": "batch",
                    "status": "processed",
                },
            )
        if path == "/v1/batches" and method == "POST":
            asked = json.loads(request.content)
            name = f"batch-{len(self.batches)}"
            self.batches[name] = self.batch(name, "in_progress", asked)
            if self.die_after_create:
                raise KeyboardInterrupt
            return httpx2.Response(200, json=self.batches[name])
        if path == "/v1/batches":
            return httpx2.Response(
                200, json={"object": "list", "data": list(self.batches.values()), "has_more": False}
            )
        if path.startswith("/v1/batches/"):
            name = path.rpartition("/")[2]
            self.polls[name] += 1
            if self.polls[name] > 1:
                self.batches[name] |= {"status": "completed", "output_file_id": f"out-{name}"}
            return httpx2.Response(200, json=self.batches[name])
        name = path.split("/")[3]
        return httpx2.Response(200, content=self.output(self.batches[name.removeprefix("out-")]))

    def batch(self, name, status, asked):
        return {"id": name, "object": "batch", "status": status, "created_at": 0, **asked}

    def output(self, batch):
        lines = []
        for number, line in enumerate(self.files[batch["input_file_id"]].splitlines()):
            request = json.loads(line)
            assert request["body"]["messages"] and request["method"] == "POST"
            # No end of a line
            choice = {"message": {"content": "the left\u2028one."}, "finish_reason": "stop"}
            body = {
                "id": "r",
                "choices": [choice],
                "usage": {"prompt_tokens": 1000, "completion_tokens": 10},
            }
            response = (
                {"status_code": 500, "body": {"error": "no"}}
                if number == 1
                else {"status_code": 200, "body": body}
            )
            line = {"custom_id": request["custom_id"], "response": response, "error": None}
            lines.append(json.dumps(line, ensure_ascii=False))
        return "\n".join([*lines, "{half a li"]).encode()


def test_batches_within_limits_at_half_the_price(tmp_path, run, monkeypatch):
    monkeypatch.setattr(batch, "MAX_REQUESTS", 4)
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    samples, theirs = make_root(tmp_path, 10), BatchService()
    report = run("trace", samples, service(theirs, monkeypatch), batch=True)
    assert [len(file.splitlines()) for file in theirs.files.values()] == [4, 4, 2]
    assert report.kept == 7 and report.failed == 3  # the second of every file
    assert report.unreadable == 3  # the torn line of every file
    assert report.cost_usd == pytest.approx(7 * 1010 / 1e6 / 2)
    again = run("trace", samples, service(theirs, monkeypatch), batch=True)
    assert again.asked == 3  # the failed ones only
    assert not list(tmp_path.glob("*.batch")) and not list(tmp_path.glob(".*.batch"))


def test_a_batch_whose_submission_was_cut_short_is_found_again(tmp_path, run, monkeypatch):
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    samples, theirs = make_root(tmp_path, 5), BatchService()
    theirs.die_after_create = True
    with pytest.raises(KeyboardInterrupt):
        run("trace", samples, service(theirs, monkeypatch), batch=True)
    theirs.die_after_create = False
    report = run("trace", samples, service(theirs, monkeypatch), batch=True)
    # Not submitted twice
    assert len(theirs.batches) == 1 and report.asked == 0 and report.kept == 4


def test_the_batch_log_survives_a_torn_line(tmp_path):
    log = batch.BatchLog(tmp_path / "ledger.jsonl")
    log.append("prepared", "a", requests={"k": ["s", 1]}, at_most_usd=0.1)
    log.append("submitted", "a", batch_id="b")
    with open(log.path, "ab") as file:
        file.write(b'{"event": "prep')
    assert [found.batch_id for found in log.open_batches()] == ["b"]
    log.append("collected", "a")
    assert log.open_batches() == []
