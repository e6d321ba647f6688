"""Metrics by group, against numbers worked out by hand."""

import pytest
from scored_rows import answers

from egm_lib.evaluation.metrics import metrics
from egm_lib.evaluation.scoring import score


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
