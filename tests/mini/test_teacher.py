"""The miniature's teacher errs at known rates, and the profile's shares set how it reasons."""

import json
from collections import Counter

import pytest
from curation_world import make_root

from egm_lib import profile
from egm_lib.curation.client import run_task
from egm_lib.curation.outputs import JsonlSamples
from egm_lib.curation.request_plan import Plan
from egm_lib.curation.tasks import TASKS
from egm_lib.data import read_samples
from egm_lib.mini import world
from egm_lib.mini.language import way_of
from egm_lib.mini.teacher import TeacherTransport
from egm_lib.profile import Teacher, load_profile

WANTED = {name: 200 if name.startswith("train") else 1 for name in world.recipes()}
SKIPPED = load_profile("mini").curation.skip_filters
VARIED = {"worked": 0.5, "concluding": 0.3, "restating": 0.2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "mini"
    world.write_world(out, WANTED)
    return out


def teacher(ways: dict | None = None) -> Teacher:
    more = {} if ways is None else {"extra_body": {"ways": ways}}
    values = {"temperature": 0.7, "max_tokens": 800, "concurrency": 8}
    return Teacher(base_url="mini", model="mini-teacher", **values, **more)


def samples_of(root, task: str) -> list[dict]:
    """Training samples; amodal ones with their written expression, as the task before leaves it."""
    if task == "trace":
        return list(read_samples(root / "train.jsonl"))
    truths = [json.loads(line) for line in (root / "teacher.jsonl").open()]
    written = {truth["sample_id"]: truth["amodal_expression"] for truth in truths}
    rows = read_samples(root / "train_amodal.jsonl")
    return [row | {"expression": written[row["sample_id"]]} for row in rows]


def curated(root, tmp_path, task: str, ways: dict | None) -> tuple[list[dict], object]:
    """Rows of the output that were kept, with their expressions; and the report."""
    samples, out = samples_of(root, task), tmp_path / "out.jsonl"
    report = run_task(
        TASKS[task], samples, teacher(ways), out=out, ledger=tmp_path / "ledger.jsonl", root=root,
        skip_filters=SKIPPED, progress=False,
    )  # fmt: skip
    expressions = {sample["sample_id"]: sample["expression"] for sample in samples}
    rows = [row for row in JsonlSamples(out) if row["status"] == "ok"]
    return [row | {"expression": expressions[row["sample_id"]]} for row in rows], report


@pytest.mark.parametrize("task", ["trace", "amodal-trace"])
def test_ways_come_at_their_shares_and_pass_the_filters(root, tmp_path, task):
    rows, report = curated(root, tmp_path, task, VARIED)
    eye = TeacherTransport(root / "teacher.jsonl")
    for row in rows:
        assert way_of(row["answer"], row["expression"]) == eye.way(row["sample_id"], VARIED)
    assert {eye.planted_error(row["sample_id"], task) for row in rows} == {None}
    assert report.kept > 0.85 * 200  # only what the teacher spoilt is dropped, in no way more


def test_the_shares_hold_over_many_samples(root):
    eye = TeacherTransport(root / "teacher.jsonl")
    counted = Counter(eye.way(f"s{n}", VARIED) for n in range(5000))
    for way, share in VARIED.items():
        assert abs(counted[way] / 5000 - share) < 0.03  # four standard errors


def test_a_larger_share_of_work_keeps_what_was_worked_out(root):
    eye = TeacherTransport(root / "teacher.jsonl")
    less, more = ({"worked": w, "concluding": 1 - w, "restating": 0.0} for w in (0.4, 0.7))
    worked = {n for n in range(500) if eye.way(f"s{n}", less) == "worked"}
    assert worked and all(eye.way(f"s{n}", more) == "worked" for n in worked)


def test_the_uniform_teacher_is_the_default_and_its_requests_are_unchanged(root, tmp_path):
    assert "ways" not in load_profile("mini").curation.teacher.extra_body
    rows, _ = curated(root, tmp_path, "trace", None)
    truths = {
        truth["sample_id"]: truth for truth in map(json.loads, (root / "teacher.jsonl").open())
    }
    assert all(row["answer"] == truths[row["sample_id"]]["reasoning"] for row in rows)
    assert "ways" not in Plan(TASKS["trace"], [], teacher(), root).sampling


def test_other_ways_are_other_questions_to_the_ledger(root, tmp_path):
    first, report = curated(root, tmp_path, "trace", None)
    again, repeated = curated(root, tmp_path, "trace", VARIED)
    assert report.asked == repeated.asked == 200  # no answer of the uniform teacher is taken over
    assert {row["sample_id"] for row in first} == {row["sample_id"] for row in again}


def test_a_profile_declares_the_shares(tmp_path, monkeypatch):
    ways = "{worked: 0.5, concluding: 0.3, restating: 0.2}"
    (tmp_path / "mini.yaml").write_text((profile.PROFILES_DIR / "mini.yaml").read_text())
    (tmp_path / "own.yaml").write_text(
        f"extends: mini\ncuration: {{teacher: {{extra_body: {{ways: {ways}}}}}}}\n"
    )
    monkeypatch.setattr(profile, "PROFILES_DIR", tmp_path)
    load_profile.cache_clear()
    asked = load_profile("own").curation.teacher
    load_profile.cache_clear()
    assert asked.extra_body == {"ways": VARIED} and asked.model == "mini-teacher"


@pytest.mark.parametrize("ways", [
    {"worked": 0.5, "concluding": 0.3, "restating": 0.1},   # 0.9 of a whole
    {"worked": 1.2, "concluding": -0.2, "restating": 0.0},  # below 0
    {"worked": 0.5, "conluding": 0.5, "restating": 0.0},    # a slip of the pen
    {"worked": 1.0},                                        # the others are not said to be 0
    "worked",
])  # fmt: skip
def test_invalid_shares_are_an_error(root, tmp_path, ways):
    rows, report = curated(root, tmp_path, "trace", ways)
    assert not rows and report.failed
    assert "shares of worked, concluding, restating" in str(report)


def test_the_teachers_errors_come_at_their_rates(tmp_path):
    make_root(tmp_path, 1)
    eye = TeacherTransport(
        tmp_path / "teacher.jsonl", error_rates={"trace": {"refusal": 0.1, "truncated": 0.2}}
    )
    kinds = Counter(eye.planted_error(f"s{number}", "trace") for number in range(5000))
    assert abs(kinds["refusal"] / 5000 - 0.1) < 0.02 and abs(kinds["truncated"] / 5000 - 0.2) < 0.02


def test_the_failure_judge_takes_the_prediction_into_account(tmp_path):
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
