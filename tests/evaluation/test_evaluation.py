"""Metrics and statistics against cases with known answers, statsmodels and scipy."""

import json

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from egm_lib.evaluation.metrics import metrics
from egm_lib.evaluation.scoring import load_predictions, score
from egm_lib.evaluation.statistics import (
    bootstrap_means,
    estimate,
    holm,
    mcnemar,
    pair,
    paired_difference,
)
from egm_lib.files import read_jsonl


def answers(boxes, **columns) -> pd.DataFrame:
    """Prediction rows for a 100 x 100 image whose target is the left upper quarter; boxes in
    0-1000, None: no box.
    """
    texts = ["I see none." if box is None else f'[{{"bbox_2d": {list(box)}}}]' for box in boxes]
    count = len(boxes)
    frame = pd.DataFrame(
        {
            "sample_id": [f"s{number}" for number in range(count)],
            "dataset": "refcoco",
            "split": "val",
            "task": "vanilla",
            "image_id": [str(number // 2) for number in range(count)],
            "expression": "red one",
            "model": "m",
            "seed": 0,
            "gt_box": [[0.0, 0.0, 50.0, 50.0]] * count,
            "width": 100,
            "height": 100,
            "frame": "NORM_1000",
            "raw_answer": texts,
            "status": "ok",
            "finish_reason": "stop",
            "reasoning_tokens": 0,
            "answer_tokens": 10,
        }
    )
    return frame.assign(**columns)


def outcomes(success, clusters=None, seed=0, split="val") -> pd.DataFrame:
    """Scored rows with given successes."""
    count = len(success)
    return pd.DataFrame(
        {
            "sample_id": [f"s{number}" for number in range(count)],
            "dataset": "refcoco",
            "split": split,
            "seed": seed,
            "image_id": list(map(str, range(count) if clusters is None else clusters)),
            "success": np.array(success, bool),
        }
    )


def test_score_of_boxes_whose_iou_is_known():
    scored = score(
        answers(
            [(0, 0, 500, 500), (0, 0, 500, 250), (0, 0, 500, 260), (500, 500, 1000, 1000), None]
        )
    )
    assert scored["iou"].tolist() == pytest.approx([1.0, 0.5, 0.52, 0.0, 0.0])
    assert scored["success"].tolist() == [True, False, True, False, False]  # Eq. 1 is strict
    assert scored["status"].tolist() == ["ok"] * 4 + ["no_box"]


def test_another_evaluators_rule_scores_the_same_answers_otherwise():
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


def test_metrics_by_group():
    scored = score(answers([(0, 0, 500, 500), (0, 0, 500, 375), None, (0, 0, 500, 500)]))
    scored = scored.assign(
        prompt_kind=["plain", "ordinal", "ordinal", "plain"],
        finish_reason=["stop"] * 3 + ["length"],
    )
    table = metrics(scored, "prompt_kind", draws=50).set_index("prompt_kind")
    assert table.loc["plain", ["n", "acc_at_50", "truncated"]].tolist() == [2, 1.0, 0.5]
    # IoU 0.75 passes 0.50 ... 0.70, strictly
    assert table.loc["ordinal", "acc_50_95"] == pytest.approx(0.5 * 0.5)
    assert table.loc["ordinal", "no_box"] == 0.5 and table.loc[
        "ordinal", "mean_iou"
    ] == pytest.approx(0.375)


def test_clustered_standard_error_agrees_with_statsmodels():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(300), rng.integers(1, 8, 300))
    values = rng.normal(size=300)[clusters] + 0.5 * rng.normal(size=len(clusters))
    fit = sm.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}
    )
    draws = bootstrap_means(values, clusters, draws=4000)[:, 0]
    assert draws.std() == pytest.approx(fit.bse[0], rel=0.06)
    naive = bootstrap_means(values, np.arange(len(values)), draws=1000)[:, 0]
    # Samples are not independent, and that is why clusters are drawn
    assert naive.std() < 0.7 * draws.std()


def test_without_clusters_the_interval_is_scipys():
    values = np.random.default_rng(1).random(400) < 0.7
    low, high = estimate(outcomes(values), draws=4000).ci95
    expected = stats.bootstrap(
        (values.astype(float),), np.mean, method="percentile", n_resamples=4000
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.006)


def test_intervals_cover_the_truth_about_95_percent_of_the_time():
    rng, covered = np.random.default_rng(2), 0
    for trial in range(200):
        chance = rng.beta(4, 2, 80)  # of an image; the mean is 2/3
        success = rng.random(240) < np.repeat(chance, 3)
        low, high = estimate(
            outcomes(success, np.repeat(np.arange(80), 3)), draws=400, rng_seed=trial
        ).ci95
        covered += low <= 2 / 3 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_mean_over_splits_weighs_splits_not_samples():
    rows = pd.concat([outcomes([True] * 90, split="val"), outcomes([False] * 10, split="testA")])
    assert estimate(rows, draws=50).mean == pytest.approx(0.9)
    assert estimate(rows, over_splits=True, draws=50).mean == pytest.approx(0.5)


def test_seeds_are_drawn_too():
    success = np.random.default_rng(3).random(300) < 0.5
    alike = pd.concat([outcomes(success, seed=seed) for seed in range(3)])
    apart = pd.concat(
        [
            outcomes(np.random.default_rng(seed).random(300) < 0.3 + 0.2 * seed, seed=seed)
            for seed in range(3)
        ]
    )
    single = estimate(outcomes(success), draws=2000).ci95
    same = estimate(alike, draws=2000).ci95
    # Copies are no new evidence
    assert np.subtract(*same) == pytest.approx(np.subtract(*single), rel=0.1)
    low, high = estimate(apart, draws=2000).ci95
    assert high - low > 2 * (single[1] - single[0])  # seeds that differ are


def test_an_estimate_is_the_same_every_time():
    rows = outcomes(np.random.default_rng(4).random(50) < 0.5)
    assert estimate(rows) == estimate(rows)
    assert estimate(rows.iloc[:0]) is None


def test_paired_difference_is_narrower_than_two_separate_intervals():
    rng = np.random.default_rng(5)
    hard = rng.random(500)
    a, b = outcomes(hard < 0.75), outcomes(hard < 0.70)
    test = paired_difference(a, b)
    assert test.mean == pytest.approx(a["success"].mean() - b["success"].mean()) and test.n == 500
    assert test.ci95[1] - test.ci95[0] < 0.06 < estimate(a).ci95[1] - estimate(a).ci95[0]
    assert test.p_value < 0.001 and test.only_b == 0


def test_paired_p_agrees_with_the_t_test_on_independent_samples():
    rng = np.random.default_rng(6)
    a, b = rng.random(800) < 0.62, rng.random(800) < 0.57
    expected = stats.ttest_rel(a.astype(float), b.astype(float)).pvalue
    assert paired_difference(outcomes(a), outcomes(b), draws=4000).p_value == pytest.approx(
        expected, rel=0.25
    )


def test_only_common_samples_are_compared_and_a_repeated_sample_is_refused():
    a, b = outcomes([True, False, True]), outcomes([False, False, True, True])
    assert paired_difference(a, b).n == 3
    assert paired_difference(a, b.iloc[3:]) is None
    with pytest.raises(ValueError, match="more than one row"):
        pair(pd.concat([a, a]), b)


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (5, 5), (1, 9), (30, 12), (100, 61)])
def test_mcnemar_agrees_with_statsmodels(only_a, only_b):
    expected = statsmodels_mcnemar([[50, only_a], [only_b, 40]], exact=True).pvalue
    assert mcnemar(only_a, only_b) == pytest.approx(expected)


def test_holm_agrees_with_statsmodels():
    p_values = [0.01, 0.04, 0.03, 0.005, 0.5, 0.04]
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())
    assert holm([]) == []


def test_a_torn_last_line_is_left_out_and_a_broken_line_is_named(tmp_path, caplog):
    path = tmp_path / "predictions" / "m" / "refcoco_val.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"sample_id": "a"}\n{"sample_id": "b"}\n{"sample_')
    assert [row["sample_id"] for row in read_jsonl(path)] == ["a", "b"]
    path.write_text('{"sample_id": "a"}\nnonsense\n{"sample_id": "b"}\n')
    assert [row["sample_id"] for row in read_jsonl(path)] == ["a", "b"]
    assert "line 2" in caplog.text


def test_predictions_of_a_folder_with_rows_that_lack_a_column(tmp_path):
    for name, row in [("b", {"sample_id": "b"}), ("a", {"sample_id": "a", "num_lookalikes": 3})]:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    frame = load_predictions(tmp_path)
    assert frame["sample_id"].tolist() == ["a", "b"] and frame["num_lookalikes"].tolist()[0] == 3
    assert pd.isna(frame["num_lookalikes"].tolist()[1])
