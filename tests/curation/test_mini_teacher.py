"""The miniature's teacher, as a service that errs at known rates."""

import json
from collections import Counter

from curation_world import make_root

from egm_lib.curation.tasks import TASKS
from egm_lib.mini.teacher import TeacherTransport


def test_the_teachers_errors_come_at_their_rates(tmp_path):
    make_root(tmp_path, 1)
    eye = TeacherTransport(
        tmp_path / "teacher.jsonl", error_rates={"trace": {"refusal": 0.1, "truncated": 0.2}}
    )
    kinds = Counter(eye.planted_error(f"s{number}", "trace") for number in range(5000))
    assert abs(kinds["refusal"] / 5000 - 0.1) < 0.02 and abs(kinds["truncated"] / 5000 - 0.2) < 0.02


def test_the_failure_judge_takes_the_prediction_into_account(tmp_path, run):
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
