"""Answers whose IoU is known, by every rule; rows that cannot be scored."""

import json

import pandas as pd
import pytest
from scored_rows import answers

from egm_lib.evaluation.scoring import load_predictions, numeric, score


def test_score_of_boxes_whose_iou_is_known():
    scored = score(
        answers(
            [(0, 0, 500, 500), (0, 0, 500, 250), (0, 0, 500, 260), (500, 500, 1000, 1000), None]
        )
    )
    assert scored["iou"].tolist() == pytest.approx([1.0, 0.5, 0.52, 0.0, 0.0])
    assert scored["success"].tolist() == [True, False, True, False, False]  # Eq. 1 is strict
    assert scored["status"].tolist() == ["ok"] * 4 + ["no_box"]


def test_another_evaluators_rule_scores_the_same_answers_differently():
    rows = answers([(0, 0, 500, 250)])  # IoU 0.5 exactly
    assert score(rows, "vlmevalkit")["success"].tolist() == [True]  # accepts >= 0.5
    several = rows.assign(raw_answer='[{"bbox_2d": [0, 0, 500, 500]}, {"bbox_2d": [0, 0, 9, 9]}]')
    assert score(several)["success"].tolist() == [True]  # ours: the first box counts
    # The authors' reward: the last
    assert score(several, "egm-released-reward")["success"].tolist() == [False]


def test_an_error_row_stays_an_error_and_counts_as_a_miss():
    scored = score(answers([(0, 0, 500, 500)] * 2).assign(status=["ok", "error"]))
    assert scored["status"].tolist() == ["ok", "error"] and scored["success"].tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    "broken",
    [
        {"gt_box": None},  # no ground truth
        {"gt_box": [1, 2, 3]},
        {"width": None},  # no size: boxes in 0..1000 cannot be placed
        {"frame": "inches"},
    ],
)
def test_a_row_that_cannot_be_scored_is_left_out_and_named(broken, caplog):
    rows = answers([(0, 0, 500, 500)] * 3)
    whole = rows.astype(object).to_dict("records")
    scored = score(pd.DataFrame([whole[0], whole[1] | broken, whole[2]]))
    assert scored["sample_id"].tolist() == ["s0", "s2"] and scored["success"].all()
    assert "sample s1" in caplog.text


def test_an_empty_box_is_a_miss(caplog):
    """The archived runs hold such answers; a model may give one, so it counts."""
    scored = score(answers([(0, 0, 0, 0), (100, 100, 100, 400)]))
    assert scored["success"].tolist() == [False, False] and scored["status"].tolist() == ["ok"] * 2
    assert not caplog.text


def test_a_frame_is_read_by_value_or_by_name():
    box = [(0, 0, 500, 500)]
    for frame in ("NORM_1000", "norm_1000", None):
        assert score(answers(box, frame=frame))["success"].tolist() == [True]


def test_predictions_of_a_folder_with_rows_that_lack_a_column(tmp_path):
    for name, row in [("b", {"sample_id": "b"}), ("a", {"sample_id": "a", "num_lookalikes": 3})]:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    frame = load_predictions(tmp_path)
    assert frame["sample_id"].tolist() == ["a", "b"] and frame["num_lookalikes"].tolist()[0] == 3
    assert pd.isna(frame["num_lookalikes"].tolist()[1])


@pytest.mark.parametrize(
    "content", ["", "[1]\n", "{}\n", '{"sample_id": "a", "raw_answer": "x"}\n']
)
def test_a_file_without_a_whole_row_has_no_scored_row(tmp_path, content):
    """A run that was killed before its first answer leaves one; the selection reads it."""
    (tmp_path / "learner.jsonl").write_text(content)
    scored = score(load_predictions(tmp_path / "learner.jsonl"))
    assert scored.empty and {"sample_id", "status", "iou", "success"} <= set(scored)


def test_what_cannot_have_been_measured_is_no_number():
    found = numeric(pd.Series([7, "8", 10**400, None, True, [1]], dtype=object))
    assert found[:2].tolist() == [7, 8] and found[2:4].isna().all() and pd.isna(found[5])
