"""Batches: within the service's limits, found again, and pending again where it lost them."""

import json
from collections import Counter

import httpx2
import pytest
from curation_world import completion, make_root, service

from egm_lib.curation import batch
from egm_lib.curation.options import CurationError


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


def test_open_batches_are_not_paid_for_again_one_by_one(tmp_path, run):
    log = batch.BatchLog(tmp_path / "ledger.jsonl")
    log.append("prepared", "a", requests={"k": ["s", 1]}, at_most_usd=0.1)
    with pytest.raises(CurationError, match="1 batches with 1 requests.*--batch to collect"):
        run("trace", make_root(tmp_path, 2))


def test_the_batch_log_survives_a_torn_line(tmp_path):
    log = batch.BatchLog(tmp_path / "ledger.jsonl")
    log.append("prepared", "a", requests={"k": ["s", 1]}, at_most_usd=0.1)
    log.append("submitted", "a", batch_id="b")
    with open(log.path, "ab") as file:
        file.write(b'{"event": "prep')
    assert [found.batch_id for found in log.open_batches()] == ["b"]
    log.append("collected", "a")
    assert log.open_batches() == []


def test_odd_entries_of_the_batch_log_are_left_out(tmp_path, caplog):
    log = batch.BatchLog(tmp_path / "ledger.jsonl")
    log.append("prepared", "a", requests={"k": ["s", 1]}, at_most_usd=0.1)
    with open(log.path, "a") as file:
        for odd in ([], {}, {"event": "submitted", "name": "unknown", "batch_id": "c"}):
            file.write(json.dumps(odd) + "\n")
        file.write('{"event": "prepared", "name": "b", "requests": [1], "at_most_usd": 0}\n')
    log.append("submitted", "a", batch_id="b")
    assert [found.batch_id for found in log.open_batches()] == ["b"]
    assert caplog.text.count("left out") == 4


class LimitedService(BatchService):
    """Accepts so many requests waiting at a time, and says no in the way of OpenAI: afterwards."""

    def __init__(self, at_once, message, at_creation=False):
        super().__init__()
        self.at_once, self.message, self.at_creation = at_once, message, at_creation
        self.refused = 0

    def __call__(self, request):
        if request.url.path != "/v1/batches" or request.method != "POST":
            return super().__call__(request)
        waiting = [theirs for theirs in self.batches.values() if theirs["status"] == "in_progress"]
        asked = json.loads(request.content)
        files = [theirs["input_file_id"] for theirs in [*waiting, asked]]
        if sum(len(self.files[name].splitlines()) for name in files) <= self.at_once:
            return super().__call__(request)
        self.refused += 1
        error = {"code": "token_limit_exceeded", "message": self.message, "line": None}
        if self.at_creation:
            return httpx2.Response(400, json={"error": error})
        name = f"batch-{len(self.batches)}"
        errors = {"object": "list", "data": [error]}
        self.batches[name] = self.batch(name, "failed", asked) | {"errors": errors}
        return httpx2.Response(200, json=self.batches[name])

    def output(self, theirs):
        return b"\n".join(
            json.dumps(
                {
                    "custom_id": json.loads(line)["custom_id"],
                    "response": {"status_code": 200, "body": completion("the left one.")},
                }
            ).encode()
            for line in self.files[theirs["input_file_id"]].splitlines()
        )


LIMIT = "Enqueued token limit reached for gpt-4.1 in organization org-x. Limit: {} enqueued tokens."


@pytest.mark.parametrize(
    "message",
    [LIMIT.format("90,000,000"), LIMIT.format("1,500"), "Enqueued token limit reached"],
)
@pytest.mark.parametrize("at_creation", [False, True])
def test_a_limit_on_waiting_tokens_makes_batches_wait(
    tmp_path, run, monkeypatch, message, at_creation
):
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    samples, theirs = make_root(tmp_path, 24), LimitedService(5, message, at_creation)
    report = run("trace", samples, service(theirs, monkeypatch), batch=True)
    assert theirs.refused and report.kept == 24 and report.failed == 0 and report.asked == 24
    assert len(report.notes) == 1 and report.cost_usd == pytest.approx(24 * 1010 / 1e6 / 2)
    assert batch.BatchLog(tmp_path / "ledger.jsonl").open_batches() == []


def test_a_limit_that_allows_nothing_leaves_all_pending(tmp_path, run, monkeypatch):
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    samples = make_root(tmp_path, 6)
    full = LimitedService(0, LIMIT.format("1"))
    report = run("trace", samples, service(full, monkeypatch), batch=True)
    assert report.waiting == 6 and report.failed == 0 and "run again later" in report.stopped
    again = run("trace", samples, service(LimitedService(9, ""), monkeypatch), batch=True)
    assert again.kept == 6


class ForgetfulService(LimitedService):
    """Answers 404 for its first batch, or for that batch's results."""

    def __init__(self, what):
        super().__init__(100, "")
        self.what = what

    def __call__(self, request):
        if request.method == "GET" and request.url.path.startswith(self.what):
            return httpx2.Response(404, json={"error": {"message": "No such thing"}})
        return super().__call__(request)


@pytest.mark.parametrize("what", ["/v1/batches/batch-0", "/v1/files/out-batch-0"])
def test_a_batch_that_the_service_forgot_is_sent_again(tmp_path, run, monkeypatch, what):
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    theirs = ForgetfulService(what)
    report = run("trace", make_root(tmp_path, 5), service(theirs, monkeypatch), batch=True)
    assert report.kept == 5 and report.failed == 0 and len(theirs.batches) == 2
    assert "has forgotten" in report.notes[0]


def test_a_service_that_forgets_everything_is_given_up(tmp_path, run, monkeypatch):
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    theirs = ForgetfulService("/v1/batches/batch-")
    report = run("trace", make_root(tmp_path, 5), service(theirs, monkeypatch), batch=True)
    assert len(theirs.batches) == batch.MAX_FORGOTTEN
    assert report.waiting == 5 and report.failed == 0 and "run again" in report.stopped


@pytest.mark.parametrize(
    "odd",
    [
        "7",
        "[]",
        "null",
        '{"custom_id": ["a"]}',
        '{"custom_id": null, "response": {"status_code": 200}}',
        '{"custom_id": "KEY", "response": "gone"}',
        '{"custom_id": "KEY", "response": {"status_code": 200}}',  # without a body
        '{"custom_id": "KEY", "response": {"status_code": 200, "body": []}}',
        '{"custom_id": "KEY", "response": null, "error": 3}',
        "[" * 100_000,
    ],
)
def test_an_odd_result_line_does_not_affect_the_others(tmp_path, run, monkeypatch, odd):
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    theirs = LimitedService(100, "")
    whole = theirs.output

    def output(asked):
        first, *others = whole(asked).split(b"\n")
        line = odd.replace("KEY", json.loads(first)["custom_id"])
        return b"\n".join([*others, line.encode(), b"\xff\xfe"])

    theirs.output = output
    report = run("trace", make_root(tmp_path, 5), service(theirs, monkeypatch), batch=True)
    assert report.kept == 4 and report.failed == 1 and report.stopped is None


def test_a_batch_refused_for_an_option_is_sent_without_it(tmp_path, run, monkeypatch):
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    theirs, sent = LimitedService(100, ""), []
    whole = theirs.output

    def output(asked):
        lines = [json.loads(line) for line in theirs.files[asked["input_file_id"]].splitlines()]
        sent.append({name for line in lines for name in line["body"]})
        if "max_tokens" not in sent[-1]:
            return whole(asked)
        message = "'max_tokens' is not supported. Use 'max_completion_tokens' instead."
        refusal = {"status_code": 400, "body": {"error": {"message": message}}}
        results = [{"custom_id": line["custom_id"], "response": refusal} for line in lines]
        return "\n".join(map(json.dumps, results)).encode()

    theirs.output = output
    report = run("trace", make_root(tmp_path, 5), service(theirs, monkeypatch), batch=True)
    assert report.kept == 5 and report.failed == 0 and len(theirs.batches) == 2
    assert sent[1] == {"model", "messages", "temperature", "max_completion_tokens"}


class OddService(LimitedService):
    """Says odd things of its batches once they have ended."""

    def __init__(self, change, times=10**9):
        super().__init__(100, "")
        self.change, self.times = change, times

    def __call__(self, request):
        response = super().__call__(request)
        ended = (
            request.url.path.startswith("/v1/batches/") and b"in_progress" not in response.read()
        )
        if not ended or self.times == 0:
            return response
        self.times -= 1
        if isinstance(self.change, bytes):
            headers = {"Content-Type": "application/json"}
            return httpx2.Response(200, content=self.change, headers=headers)
        return httpx2.Response(200, json=response.json() | self.change)


@pytest.mark.parametrize(
    "change",
    [
        *({"errors": odd} for odd in ("lost", [], [{"message": "x"}], {"data": [None]}, 7)),
        *({"errors": {"data": odd}} for odd in ("x", [{"code": 7, "message": None}])),
        {"error_file_id": 7},
        {"metadata": None},
    ],
)
def test_odd_fields_of_a_batch_do_not_lose_its_answers(tmp_path, run, monkeypatch, change):
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    asked = service(OddService(change), monkeypatch)
    assert run("trace", make_root(tmp_path, 4), asked, batch=True).kept == 4


@pytest.mark.parametrize("change", [b"null", b"[]", b'"x"', b"<html>", b"", {"status": None}])
def test_what_is_no_batch_is_asked_for_again(tmp_path, run, monkeypatch, change):
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    asked = service(OddService(change, times=2), monkeypatch)
    assert run("trace", make_root(tmp_path, 4), asked, batch=True).kept == 4


@pytest.mark.parametrize(
    "change", [{"errors": {"data": [None]}}, {"errors": "no room"}, {"output_file_id": 7}]
)
def test_a_failed_batch_without_a_reason_fails_its_own_samples(tmp_path, run, monkeypatch, change):
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    failed = OddService({"status": "failed", "output_file_id": None, **change})
    report = run("trace", make_root(tmp_path, 4), service(failed, monkeypatch), batch=True)
    assert report.failed == 4 and report.kept == 0
    well = service(LimitedService(100, ""), monkeypatch)
    assert run("trace", make_root(tmp_path, 4), well, batch=True).kept == 4  # asked again


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
def test_a_submission_without_an_id_is_one_sentence(tmp_path, run, monkeypatch, path):
    theirs = LimitedService(100, "")

    def odd(request):
        response = theirs(request)
        here = request.url.path == path and request.method == "POST"
        return httpx2.Response(200, json={"id": None}) if here else response

    with pytest.raises(CurationError, match="without an id; run again"):
        run("trace", make_root(tmp_path, 4), service(odd, monkeypatch), batch=True)
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    report = run("trace", make_root(tmp_path, 4), service(theirs, monkeypatch), batch=True)
    assert report.kept == 4 and len(theirs.batches) == 1  # nothing is submitted twice
