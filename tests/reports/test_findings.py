"""Sentences made from numbers: the word for what an interval says; "not run" without files."""

import pytest
from prediction_rows import prediction, write_rows

from egm_lib.data import eval_splits, split_id
from egm_lib.evaluation.results import Results
from egm_lib.evaluation.statistics import Difference
from egm_lib.reports.findings import TOPICS, _verdict, findings


def difference(low: float, high: float) -> Difference:
    return Difference((low + high) / 2, (low, high), 100, None, 0, 0, None)


@pytest.mark.parametrize(
    "low, high, word",
    [
        (0.01, 0.1, "yes"),
        (-0.1, -0.01, "no, the opposite"),
        (-0.1, 0.1, "cannot be told from chance"),
        (0.0, 0.1, "cannot be told from chance"),  # an interval that touches zero shows nothing
    ],
)
def test_the_word_follows_the_interval(low, high, word):
    assert f"**{word}**" in _verdict(difference(low, high), "It helps")


def test_numbers_are_those_of_the_files(tmp_path):
    root = tmp_path / "toy-0"
    for model, solved in {"small-base": 2, "small-egm": 8}.items():
        for pair in eval_splits("vanilla"):
            rows = [prediction("vanilla", *pair, n, model, n < solved, 0) for n in range(10)]
            write_rows(root / "predictions" / model / f"{split_id(*pair)}.jsonl", rows)
    results = Results([root], draws=200)
    assert "`small-base` finds 20.0 %" in findings(results, "bases")
    answer = findings(results, "did it help")
    assert "Learning to reason helps the small model: **yes**, +60.0 points" in answer
    assert "GRPO adds" not in answer  # small-sft has not answered


@pytest.mark.parametrize("topic", TOPICS)
def test_without_files_a_topic_is_not_run(tmp_path, topic):
    (tmp_path / "toy-0").mkdir()
    assert findings(Results([tmp_path / "toy-0"]), topic) == f"{topic}: not run."
