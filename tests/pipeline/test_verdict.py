"""A run beside the committed results: what counts as the same."""

import pytest

from egm_lib.pipeline.verdict import IDENTICAL, NOT_RUN, OUTSIDE, WITHIN, verdict

COMMITTED = {
    "profile": "toy",
    "seeds": [0],
    "git": "a",
    "hardware": {"cpu": "x"},
    "rule": "egm",
    "acc_at_50": {"small-base": {"mean": 0.5, "ci95": [0.45, 0.55], "n": 10}},
    "amodal_acc_at_50": {"small-base": None},
    "differences": {},
}


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {name}"))


@pytest.mark.parametrize(
    "mean, ci95, answer",
    [
        (0.5, [0.45, 0.55], IDENTICAL),
        (0.55, [0.5, 0.6], WITHIN),  # the interval's end belongs to it
        (0.5, [0.44, 0.55], WITHIN),  # the same mean with another interval is not the same run
        (0.551, [0.5, 0.6], OUTSIDE),
    ],
)
def test_a_number_is_identical_within_or_outside(mean, ci95, answer):
    yours = {**COMMITTED, "acc_at_50": {"small-base": {"mean": mean, "ci95": ci95, "n": 10}}}
    text = verdict(yours, COMMITTED)
    assert row(text, "small-base").endswith(f"| {answer} |")
    assert f"Of 1 numbers: 1 {answer}." in text


def test_numbers_are_rounded_as_in_the_tables():
    """54 of 96 is 56.25 %: half goes up, as by hand; and there is no "-0.0"."""
    value = {"mean": 0.5625, "ci95": [-0.0001, 0.6125], "n": 96}
    summary = {**COMMITTED, "acc_at_50": {"small-base": value}}
    assert "| 56.3 [0.0, 61.3] |" in row(verdict(summary, summary), "small-base")


def test_a_model_that_only_one_run_has_is_not_run_in_the_other():
    other = {"mean": 0.9, "ci95": None, "n": 3}
    text = verdict({**COMMITTED, "amodal_acc_at_50": {"small-egm": other}}, COMMITTED)
    assert row(text, "small-egm") == f"| small-egm, amodal | 90.0 | {NOT_RUN} | {NOT_RUN} |"


def test_the_reason_is_named_if_it_is_known():
    text = verdict({**COMMITTED, "git": "b", "hardware": {"cpu": "y"}}, COMMITTED)
    assert text.endswith("The two runs differ in code, hardware.")
    assert "differ" not in verdict(COMMITTED, COMMITTED)


def test_without_committed_results_there_is_nothing_to_compare():
    assert "nothing to compare" in verdict(COMMITTED, None)


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"acc_at_50": 3, "amodal_acc_at_50": None},
        {**COMMITTED, "acc_at_50": {"small-base": 0.5}},
        {**COMMITTED, "acc_at_50": {"small-base": {"mean": 0.5}}},
        {**COMMITTED, "differences": {"a": {"mean": 0.1, "ci95": [None, 1], "n": 3}}},
    ],
)
def test_committed_results_of_another_shape_are_not_compared(odd):
    """Such as those of an older release: the run is finished and must not end with them."""
    assert "another shape, so there is nothing to compare" in verdict(COMMITTED, odd)
