"""Agreement of judges against hand-made tables and definitions."""

import json

import numpy as np
import pandas as pd
import pytest

from egm_lib.curation.judges import agreement, write_judgements
from egm_lib.curation.tasks import CAUSES


def judgements(**verdicts):
    rows = [
        {"sample_id": f"s{i}", "judge": judge, "cause": cause}
        for judge, causes in verdicts.items()
        for i, cause in enumerate(causes)
    ]
    return pd.DataFrame(rows)


def test_cohens_kappa_by_hand():
    """35 of 50 equal; the judges say COMPLEX-PROMPT 25 and 30 times: chance .5 * .6 + .5 * .4 = .5,
    kappa = .2 / .5.
    """
    complex_, other = "COMPLEX-PROMPT", "OTHER"
    a = [complex_] * 20 + [complex_] * 5 + [other] * 10 + [other] * 15
    b = [complex_] * 20 + [other] * 5 + [complex_] * 10 + [other] * 15
    row = agreement(judgements(a=a, b=b)).loc["a - b"]
    assert (
        row["percent"] == pytest.approx(70)
        and row["kappa"] == pytest.approx(0.4)
        and row["n"] == 50
    )
    assert row["low"] < 0.4 < row["high"]


def test_fleiss_kappa_by_its_definition():
    rng = np.random.default_rng(0)
    causes_N_J = np.where(
        rng.random((60, 3)) < 0.7, rng.integers(5, size=(60, 1)), rng.integers(5, size=(60, 3))
    )
    table = agreement(
        judgements(**{f"j{j}": [CAUSES[c] for c in causes_N_J[:, j]] for j in range(3)}), draws=50
    )
    counts_N_C = (causes_N_J[:, :, None] == np.arange(5)).sum(axis=1)
    observed = np.mean([(n * (n - 1)).sum() / 6 for n in counts_N_C])
    chance = ((counts_N_C.sum(axis=0) / 180) ** 2).sum()
    assert table.loc["all", "kappa"] == pytest.approx((observed - chance) / (1 - chance))
    assert table.loc["all", "low"] < table.loc["all", "kappa"] < table.loc["all", "high"]
    assert table.loc["all", "percent"] == pytest.approx(
        100 * np.mean([len(set(row)) == 1 for row in causes_N_J])
    )


def test_only_failures_that_all_judged_count_and_unanimity_has_no_kappa():
    rows = judgements(a=["OTHER", "OTHER", "GT-ERROR"], b=["OTHER", "OTHER"])
    row = agreement(rows).loc["a - b"]
    assert row["n"] == 2 and row["percent"] == 100 and np.isnan(row["kappa"])


def test_without_a_common_failure_there_is_no_agreement():
    separate = pd.concat([judgements(a=["OTHER"]), judgements(b=["OTHER"]).assign(sample_id="t")])
    for rows in (separate, pd.DataFrame(), judgements(a=[])):
        assert agreement(rows).empty


def test_a_judge_who_is_listed_twice_counts_by_the_last_verdict():
    rows = judgements(a=["OTHER", "OTHER"], b=["OTHER", "OTHER"])
    row = agreement(pd.concat([rows, judgements(b=["GT-ERROR"])])).loc["a - b"]
    assert row["n"] == 2 and row["percent"] == 50


def test_judgements_file_leaves_out_what_was_filtered(tmp_path):
    for judge, status in (("a", "ok"), ("b", "filtered")):
        row = {"sample_id": "s", "status": status, "answer": "OTHER"}
        (tmp_path / judge).write_text(json.dumps(row) + "\n")
    assert (
        write_judgements(tmp_path / "all.jsonl", {judge: tmp_path / judge for judge in "ab"}) == 1
    )
    assert json.loads((tmp_path / "all.jsonl").read_text()) == {
        "sample_id": "s",
        "judge": "a",
        "cause": "OTHER",
    }
