"""The client against a local server: nothing is lost or paid twice, and no key leaks."""

import asyncio
import json
import logging
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter

import httpx2
import pytest
from curation_server import reply_text, running
from curation_world import completion, make_root, service, teacher
from killed_runs import kills

from egm_lib.curation.client import estimate
from egm_lib.curation.options import CurationError, Refused
from egm_lib.curation.outputs import JsonlSamples, kept
from egm_lib.curation.request_plan import Plan, Receipts
from egm_lib.curation.tasks import TASKS
from egm_lib.profile import ProfileError


def trace_command(folder, url, concurrency):
    files = ["--input", f"{folder}/samples.jsonl", "--output", f"{folder}/out.jsonl"]
    asked = ["--base-url", url, "--model", "fake", "--concurrency", str(concurrency)]
    return [sys.executable, "-m", "egm_lib.curation", "trace", *files, *asked]


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


def test_answered_samples_are_not_sent_again_and_filters_rerun_for_free(tmp_path, run):
    samples = make_root(tmp_path, 30)
    assert run("trace", samples[:20]).asked == 20
    assert run("trace", samples).asked == 10
    assert run("trace", samples).kept == 0  # the traces hold places
    again = run("trace", samples, skip_filters=["coordinates", "too-many-sentences"])
    assert again.asked == 0 and again.kept > 20


def test_a_repeated_sample_is_paid_for_once(tmp_path, run):
    samples = make_root(tmp_path, 5) * 3
    report = run("verify", samples)
    assert report.asked == 5 and len(run.rows("verify")) == 15


def test_the_budget_is_never_exceeded_and_a_larger_one_continues(tmp_path, run):
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


def test_replies_that_are_no_answers_stay_within_the_budget(tmp_path, run, monkeypatch):
    """Each is charged, so each further try needs room."""
    samples = make_root(tmp_path, 1)
    theirs = service(
        lambda request: httpx2.Response(200, json=completion("", "tool_calls")), monkeypatch
    )
    plan = Plan(TASKS["verify"], samples, theirs, tmp_path)
    budget_usd = 1.5 * plan.at_most_usd(plan.request(samples[0]))
    monkeypatch.setattr(Receipts, "receive", charged(budget_usd / 1.5))
    report = run("verify", samples, theirs, budget_usd=budget_usd)
    assert report.cost_usd <= budget_usd and "budget" in report.stopped and report.waiting == 1


def charged(usd):
    """A reply that is no answer and costs as much as it may."""

    def receive(self, request, body, **extra):
        self.ledger.append({"key": request.key, "status": "unreadable", "cost_usd": usd})
        self.report.cost_usd += usd
        return "no answer"

    return receive


def test_a_budget_without_a_price_is_refused(tmp_path, run):
    with pytest.raises(CurationError, match="price"):
        run("trace", make_root(tmp_path, 1), teacher(price_per_mtok=None), budget_usd=1.0)


def test_the_estimate_sends_no_request_and_learns_from_the_ledger(tmp_path, run):
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


def test_a_killed_run_loses_nothing_and_pays_once(tmp_path):
    make_root(tmp_path, 200)
    log, ledger = tmp_path / "paid.log", tmp_path / "out.ledger.jsonl"
    with running("--delay-ms", "150", "--log", str(log)) as url:
        command = trace_command(tmp_path, url, concurrency=8)
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
        command = trace_command(tmp_path, url, concurrency=4)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not log.read_text():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 4
    rows = list(JsonlSamples(tmp_path / "out.jsonl"))
    # Every answer that was paid is there
    assert len(rows) == len(log.read_text().splitlines()) < 100


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
        # No words to train on, and no damage to the file
        ({"choices": [{"message": {"content": "half \ud83d of a pair"}}]}, "filtered"),
        (completion("left of it.", "length"), "filtered"),  # cut
        (completion("left of", "content_filter"), "filtered"),  # the same when asked again
        (completion("left of", "SAFETY"), "filtered"),
        *[  # ended for another reason: asked again, and by the next run too
            (completion("left of it.", reason), "failed")
            for reason in ("error", "abort", "MAX_TOKENS", "tool_calls", "STOP", None)
        ],
        (completion(None, "length", reasoning_content="the left"), "filtered"),  # no answer begun
        ({"error": {"message": "with status 200"}}, "failed"),
        ({"choices": []}, "failed"),
        ([], "failed"),
    ],
)
def test_only_a_finished_answer_is_kept(tmp_path, run, monkeypatch, without_pauses, body, status):
    answering = service(
        lambda request: httpx2.Response(200, content=json.dumps(body).encode()), monkeypatch
    )
    run("trace", make_root(tmp_path, 1), answering)
    assert [row["status"] for row in run.rows("trace")] == [status]
    assert (run("trace", make_root(tmp_path, 1), answering).asked == 1) == (status == "failed")


def test_a_service_that_answers_nonsense_is_given_up(tmp_path, run, monkeypatch, without_pauses):
    asked = []

    def handler(request):
        asked.append(request)
        return httpx2.Response(200, text="<html>maintenance</html>")

    report = run("trace", make_root(tmp_path, 300), service(handler, monkeypatch))
    assert "in a row failed" in report.stopped and report.waiting > 150
    assert "web page" in report.failures[0][1]


def test_verdicts_are_requested_at_temperature_0(tmp_path, run, monkeypatch):
    """The teacher's 0.7 is for texts."""
    asked = {}

    def handler(request):
        asked[request.headers["X-EGM-Task"]] = json.loads(request.content).get("temperature")
        return httpx2.Response(200, json=completion("YES"))

    for name in ("trace", "amodal-expression", "verify", "amodal-trace"):
        run(name, make_root(tmp_path, 1), service(handler, monkeypatch))
    assert asked == {"trace": 0.7, "amodal-expression": 0.7, "verify": 0.0, "amodal-trace": 0.7}
    run("verify", make_root(tmp_path, 1), service(handler, monkeypatch, temperature=None))
    assert asked["verify"] is None  # left out where the profile leaves it out


def test_half_a_surrogate_pair_in_a_sample_stops_nothing(tmp_path, run, monkeypatch):
    samples = make_root(tmp_path, 3)
    samples[1] |= {"sample_id": "s\ud83d", "expression": "the \ud83d cup"}
    answering = service(
        lambda request: httpx2.Response(200, json=completion("left of it.")), monkeypatch
    )
    assert run("trace", samples, answering).kept == 3


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
    with pytest.raises(ProfileError, match="the given value is not one") as misplaced:
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
