"""Eq. 8 on whole completions, in TRL's and VeRL's signatures."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egm_lib.boxes import BoxFrame, iou, is_success
from egm_lib.files import read_jsonl
from egm_lib.parsing import parse_completion
from egm_lib.prompts import FAMILIES
from egm_lib.reward import compute_score, egm_reward, grounding_reward

GT, WH = (100.0, 100.0, 300.0, 200.0), (1000, 500)  # in 0-1000: [100, 200, 300, 400]
BANK = Path(__file__).parents[3] / "shared" / "data" / "parser_bank.jsonl"


@pytest.mark.parametrize(
    "completion, reward",
    [
        ('{"bbox_2d": [100, 200, 300, 400]}', 1.0),  # exact: 0.5 * 1 + 0.5 * 1
        ("<box>[[100, 200, 300, 400]]</box>", 1.0),  # the other family
        ("[100, 200, 300, 300]", 0.25),  # IoU exactly 0.5 is no success: 0.5 * 0 + 0.5 * 0.5
        ("[100, 200, 300, 350]", 0.875),  # IoU 0.75: 0.5 * 1 + 0.5 * 0.75
        ("[500, 500, 600, 600]", 0.0),  # elsewhere
        ("[300, 400, 100, 200]", 1.0),  # swapped corners are sorted
        ("[100, 200, 300, 400] or [500, 500, 600, 600]", 1.0),  # the first of several
        # Listing boxes until one fits earns nothing
        ("[500, 500, 600, 600] or [100, 200, 300, 400]", 0.0),
        # Nor does naming it while reasoning
        ("[100, 200, 300, 400]</think>[500, 500, 600, 600]", 0.0),
        ("[500, 500, 600, 600]</think>[100, 200, 300, 400]", 1.0),
        ("<think>it is at [100, 200, 300, 400]", 0.0),  # cut off before the answer
        ("[100, 100, 300, 200]", 0.0),  # the right pixels, in the wrong frame
        ("[100, 200, 300]", 0.0),  # no box
        ("[-1e300, -1e300, 1e300, 1e300]", 0.0),  # everything and more
        ("", 0.0),
    ],
)
def test_rewards(completion, reward):
    chat = [{"role": "assistant", "content": completion}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": completion}]}]
    rewards = egm_reward(
        [completion, chat, parts], gt_box=[GT] * 3, image_wh=[WH] * 3, prompts=["?"] * 3
    )
    assert rewards == pytest.approx([reward] * 3)
    assert compute_score(
        "refcoco", completion, list(GT), {"width": 1000, "height": 500}
    ) == pytest.approx(reward)


@pytest.mark.parametrize("weight, expected", [(0.0, 0.75), (0.5, 0.875), (1.0, 1.0)])
def test_the_weight_belongs_to_success(weight, expected):
    assert grounding_reward((0, 0, 1, 0.75), (0, 0, 1, 1), weight) == expected
    assert egm_reward(
        ["[0, 0, 1, 0.75]"], [(0, 0, 1, 1)], [(9, 9)], frame=BoxFrame.PIXEL, weight=weight
    ) == [expected]


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4), st.sampled_from(sorted(FAMILIES)))
def test_reward_and_metric_agree(box, family):
    answer = FAMILIES[family].answer(box, (1000, 1000), "cat", "why")
    pred = parse_completion(answer, frame=FAMILIES[family].frame, image_wh=WH).box
    expected = 0.5 * is_success(pred, GT) + 0.5 * iou(pred, GT)
    assert egm_reward([answer], [GT], [WH]) == [expected]
    assert 0.0 <= expected <= 1.0


def test_no_prediction_earns_nothing():
    assert grounding_reward(None, GT) == 0.0


@pytest.mark.parametrize("gt", [(3, 1, 2, 4), (1, 2, 3), (1, 2, 3, float("nan"))])
def test_bad_ground_truth_is_an_error_not_a_reward(gt):
    for pred in (None, GT):
        with pytest.raises(ValueError, match="gt"):
            grounding_reward(pred, gt)


@pytest.mark.parametrize("column", ["gt_box", "image_wh", "frame", "weight"])
def test_trl_columns_of_different_length_are_refused(column):
    columns = dict(gt_box=[GT] * 2, image_wh=[WH] * 2, frame=[None] * 2, weight=[None] * 2)
    columns[column] = columns[column][:1]
    with pytest.raises(ValueError, match=f"completions and {column} differ in length: 2 and 1"):
        egm_reward(["a", "b"], **columns)


@pytest.mark.parametrize(
    "completion",
    [
        None,
        "",
        [],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant"}],
        [{"role": "assistant", "content": [None, {"type": "text", "text": None}]}],
        [{"role": "assistant", "content": [{"type": "image"}]}],
    ],
)
def test_an_answer_without_text_earns_nothing_and_does_not_stop_its_group(completion):
    group = [completion, "[100, 200, 300, 400]"]
    assert egm_reward(group, [GT] * 2, [WH] * 2) == pytest.approx([0.0, 1.0])


def test_a_null_solution_earns_nothing():
    assert compute_score("refcoco", None, GT, {"image_wh": WH}) == 0.0


NAN = float("nan")  # what pandas makes of an empty cell


@pytest.mark.parametrize("empty", [None, NAN, np.float32("nan"), pd.NA, pd.array([None, 1])[0]])
def test_empty_cells_of_a_table_mean_not_given(empty):
    answer = "[100, 200, 300, 350]"  # IoU 0.75
    assert egm_reward([answer], [GT], [WH], frame=empty, weight=empty) == pytest.approx([0.875])
    columns = dict(frame=[empty, "norm_1000"], weight=[empty, 1.0])
    assert egm_reward([answer] * 2, [GT] * 2, [WH] * 2, **columns) == pytest.approx([0.875, 1.0])
    info = dict.fromkeys(("image_wh", "frame", "weight", "ground_truth_frame"), empty)
    info |= {"width": 1000, "height": 500}
    assert compute_score("refcoco", answer, GT, info) == pytest.approx(0.875)
    with pytest.raises(ValueError, match='"width" and "height"'):
        compute_score("refcoco", answer, GT, {"width": empty, "height": 500, "image_wh": empty})


def test_columns_that_arrow_and_pandas_filled_with_nulls():
    """Rows of two sources in one table: what only one of them has is null for the other."""
    rows = [
        {"width": 1000, "height": 500},
        {"image_wh": list(WH), "frame": "pixel", "weight": 1.0},
    ]
    answers = ["[100, 200, 300, 350]", "[100, 100, 300, 175]"]
    table = pa.Table.from_pylist(
        rows, schema=pa.unify_schemas([pa.Table.from_pylist([row]).schema for row in rows])
    )
    for infos in (table.to_pylist(), table.to_pandas().to_dict("records")):
        scores = [
            compute_score("refcoco", answer, GT, info)
            for answer, info in zip(answers, infos, strict=True)
        ]
        assert scores == pytest.approx([0.875, 1.0])


@pytest.mark.parametrize("frame", [BoxFrame.PIXEL, "pixel", "PIXEL", ["pixel"]])
def test_a_frame_may_be_text(frame):
    assert egm_reward(["[100, 100, 300, 200]"], [GT], [WH], frame=frame) == [1.0]


@pytest.mark.parametrize(
    "ground_truth, info",
    [
        (list(GT), {"image_wh": WH}),
        (np.array(GT), {"image_wh": np.array(WH)}),  # as parquet files come back
        (json.dumps(GT), {"width": 1000, "height": 500}),
        # The released parquet files
        ([100, 200, 300, 400], {"image_wh": WH, "ground_truth_frame": "norm_1000"}),
    ],
)
def test_verl_ground_truths(ground_truth, info):
    assert compute_score("refcoco", "[100, 200, 300, 400]", ground_truth, info) == pytest.approx(
        1.0
    )


def test_verl_needs_the_image_size():
    with pytest.raises(ValueError, match='"width" and "height"'):
        compute_score("refcoco", "[1, 2, 3, 4]", GT)


@pytest.mark.skipif(not BANK.exists(), reason="the parser bank is not part of the project")
def test_every_answer_of_the_bank_earns_full_reward_for_the_box_it_names():
    rows = read_jsonl(BANK)
    for row in rows:
        box = parse_completion(row["raw"], frame=BoxFrame.NORM_1000, image_wh=(1000, 1000)).box
        if box is not None:
            assert egm_reward([row["raw"]], [box], [(1000, 1000)]) == pytest.approx([1.0]), row[
                "id"
            ]
