"""Intervals, differences and corrections against statsmodels, scipy and known cases."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from scored_rows import outcomes
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from egm_lib.evaluation.statistics import (
    bootstrap_means,
    estimate,
    holm,
    mcnemar,
    pair,
    paired_difference,
)


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


def test_one_image_or_no_variance_is_no_evidence():
    rows = outcomes(np.ones(6)).assign(image_id="a")
    other = outcomes(np.zeros(6)).assign(image_id="a")
    assert estimate(rows).ci95 is None
    alone = paired_difference(rows, other)
    assert alone.mean == 1 and alone.ci95 is None and alone.p_value is None
    always = paired_difference(outcomes(np.ones(6)), outcomes(np.zeros(6)))
    assert always.p_value is None  # six of six, and a standard error of zero
    same = paired_difference(outcomes(np.ones(6)), outcomes(np.ones(6)))
    assert same.p_value == 1


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
