"""The protocol's answers: hand-made differences, and runs whose truth is known."""

import re
from pathlib import Path

import pytest
from prediction_rows import prediction, write_rows

from egm_lib.evaluation.hypotheses import HYPOTHESES, findings, status_of
from egm_lib.evaluation.results import Results
from egm_lib.evaluation.statistics import Difference
from egm_lib.files import project_root

PER_SPLIT, SPLITS = 60, ("testA", "testB")


def difference(mean: float, low: float, high: float) -> Difference:
    return Difference(mean, (low, high), 100, None, 0, 0, None)


@pytest.mark.parametrize(
    ("claim", "mean", "low", "high", "p", "status"),
    [
        # The rows of the table in docs/protocol.md; the margin is 3 points
        ("better", 0.05, 0.02, 0.08, 0.01, "holds"),
        ("better", 0.01, 0.005, 0.02, 0.01, "holds"),  # by less than the margin, and still so
        ("better", 0.05, 0.001, 0.10, 0.06, "not told apart"),  # not after Holm
        ("better", 0.00, -0.02, 0.02, 0.90, "does not hold"),  # wholly within the margin
        ("better", -0.05, -0.08, -0.02, 0.01, "does not hold"),
        ("better", 0.00, -0.05, 0.05, 0.90, "not told apart"),
        ("at least as good", 0.00, -0.02, 0.05, None, "holds"),
        ("at least as good", -0.05, -0.08, -0.01, None, "does not hold"),
        ("at least as good", -0.02, -0.05, 0.01, None, "not told apart"),
        ("equal", 0.01, -0.01, 0.02, None, "holds"),
        ("equal", 0.05, 0.01, 0.08, None, "does not hold"),
        ("equal", 0.01, -0.01, 0.04, None, "not told apart"),
    ],
)
def test_an_answer_is_that_of_the_protocols_table(claim, mean, low, high, p, status):
    assert status_of(claim, difference(mean, low, high), p) == status


def test_a_missing_run_is_not_run():
    assert status_of("better", None, None) == "not run"


def test_the_protocol_names_the_same_hypotheses():
    """The registered text and the code that answers it may not part."""
    text = (project_root() / "docs" / "protocol.md").read_text(encoding="utf-8")
    table = re.findall(r"(?m)^\| \**(H\d)\** \|", text)
    (row,) = re.findall(r"(?m)^\| ((?:H\da, )+H\da) \|", text)
    assert [*table, *row.split(", ")] == [of.name for of in HYPOTHESES]


def run_of(root: Path, solved: dict[str, int], seed: int) -> Path:
    """A run in which each model solves so many samples of every split."""
    folder = root / f"toy-{seed}"
    for model, hits in solved.items():
        for split in SPLITS:
            rows = [
                prediction("vanilla", "refcoco", split, n, model, n < hits, seed)
                for n in range(PER_SPLIT)
            ]
            write_rows(folder / "predictions" / model / f"refcoco_{split}.jsonl", rows)
    return folder


def test_known_truths_are_found(tmp_path):
    """GRPO gains 20 of 60 where the teacher varies and nothing where it is uniform."""
    varied = {"small-egm": 50, "small-sft": 30, "small-sft-control": 30, "small-base": 20}
    uniform = {"small-egm": 40, "small-sft": 40, "small-sft-control": 40}
    results = {
        name: Results([run_of(tmp_path / name, solved, seed) for seed in (0, 1)])
        for name, solved in (("varied", varied), ("uniform", uniform))
    }
    found = {row.hypothesis.name: row for row in findings(results, draws=200)}
    for name in ("H1", "H2", "H3", "H4", "H5"):
        assert found[name].status == "holds", name
    assert found["H4"].difference.mean == pytest.approx(20 / 60)
    assert found["H3"].difference.mean == 0
    assert found["H6"].status == "not run"  # its control has no predictions
    alone = {row.hypothesis.name: row for row in findings({"varied": results["varied"]})}
    assert alone["H1"].status == "holds" and alone["H4"].status == "not run"
