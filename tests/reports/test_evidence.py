"""Tables of the registered experiment, on runs whose truth is known."""

import json

import pytest
from prediction_rows import prediction, write_rows

from egm_lib.evaluation.results import Results
from egm_lib.reports.tables.cells import Number
from egm_lib.reports.tables.evidence import (
    by_teacher,
    table_hypotheses,
    table_samples,
    table_validation,
    table_ways,
)

VARIED = {"worked": 0.4, "concluding": 0.4, "restating": 0.2}
TRACES = {
    "worked": "red circles: 100 200, 300 400. the second one is at 300 400.",
    "concluding": "the second red one is at 300 400.",
    "restating": "it is the second red one.",
}


def run_of(root, name, ways, answers):
    """A run with a manifest. answers: by model, a list of (solved, way) for each of its samples."""
    folder = root / name
    teacher = {"extra_body": {} if ways is None else {"ways": ways}}
    folder.mkdir(parents=True)
    values = {"values": {"curation": {"teacher": teacher}}}
    (folder / "manifest.json").write_text(json.dumps(values))
    for model, given in answers.items():
        rows = []
        for number, (solved, way) in enumerate(given):
            row = prediction("vanilla", "refcoco", "val", 2 * number + 1, model, solved, 0)
            rows.append(row | {"raw_answer": row["raw_answer"].replace("look", TRACES[way])})
        write_rows(folder / "predictions" / model / "refcoco_val.jsonl", rows)
    return folder


def test_samples_and_ways_are_counted(tmp_path):
    """Four prompts, two samples of each: 3 of 8 right, and 2 of 4 prompts in at least one."""
    greedy = [(True, "worked"), (False, "restating"), (False, "restating"), (False, "concluding")]
    first = [(True, "worked"), (True, "worked"), (False, "worked"), (False, "worked")]
    second = [(True, "worked"), (False, "restating"), (False, "worked"), (False, "worked")]
    answers = {"small-egm": greedy, "small-egm@sample-1": first, "small-egm@sample-2": second}
    results = Results([run_of(tmp_path, "mini-full-0", VARIED, answers)], draws=50)
    (row,) = table_samples(results).rows
    values = [cell.value for cell in row.cells if isinstance(cell, Number)]
    assert row.label == "small-egm, vanilla"
    assert values[:4] == pytest.approx([25.0, 37.5, 50.0, 2])
    assert values[4:] == pytest.approx([25.0, 25.0, 50.0, 87.5, 0.0, 12.5])


def test_each_way_is_scored_by_itself(tmp_path):
    """Worked: 2 of 4 and 1 of 2 right; the base, which gives no reasoning, has no row."""
    egm = [(True, "worked"), (False, "worked"), (False, "restating"), (False, "concluding")]
    run = run_of(tmp_path, "mini-full-0", VARIED, {"small-egm": egm})
    direct = prediction("vanilla", "refcoco", "val", 1, "small-base", True, 0)
    answer = direct["raw_answer"].partition("</think>")[2]
    rows = [direct | {"raw_answer": answer}]
    write_rows(run / "predictions" / "small-base" / "refcoco_val.jsonl", rows)
    (row,) = table_ways(Results([run], draws=50)).rows
    values = [cell.value for cell in row.cells]
    assert row.label == "small-egm, vanilla"
    assert values == pytest.approx([50.0, 50.0, 2, 25.0, 0.0, 1, 25.0, 0.0, 1])
    other = run_of(tmp_path, "mini-0", None, {"small-egm": egm})
    assert table_ways(Results([other], draws=50)).rows == []


def test_validation_is_apart_from_the_test_splits(tmp_path):
    """Greedy 1 of 2 right, sampled 0 of 2, though the test split says otherwise."""
    run = run_of(tmp_path, "mini-full-0", VARIED, {"small-egm": [(True, "worked")] * 5})
    for model, solved in (
        ("small-egm", (True, False)),
        ("small-egm@sample-1", (False, False)),
        ("reference", (True, True)),
        ("small-egm@budget-4", (False, False)),  # neither greedy nor a sample
        ("huge-base", (True, False)),  # has no answer to a test split
    ):
        rows = [
            prediction("vanilla", "refcoco", "validation", number, model, right, 0)
            for number, right in enumerate(solved)
        ]
        write_rows(run / "validation" / f"{model}.jsonl", rows)
    results = Results([run], draws=50)
    assert results.of("small-egm")["success"].mean() == 1
    egm, huge, reference = table_validation(results).rows
    assert huge.label == "huge-base"
    assert [cell.value for cell in egm.cells] == pytest.approx([50.0, 2, 0.0, 2])
    assert [cell.value for cell in reference.cells[:2]] == pytest.approx([100.0, 2])
    assert reference.cells[2:] == [None, None]


def test_only_the_experiments_own_runs_answer_its_hypotheses(tmp_path):
    """The first mini-full had the uniform teacher; its numbers must not answer for the varied."""
    answers = {model: [(True, "worked")] * 6 for model in ("small-egm", "small-sft")}
    old = Results([run_of(tmp_path / "old", "mini-full-0", None, answers)], draws=50)
    assert by_teacher(old) == {} and table_hypotheses(old).rows == []
    new = run_of(tmp_path / "new", "mini-full-0", VARIED, answers)
    run_of(tmp_path / "new", "mini-uniform-0", None, answers)
    assert set(by_teacher(Results([new], draws=50))) == {"varied", "uniform"}
    rows = {row.label.split()[0]: row.cells for row in table_hypotheses(Results([new])).rows}
    assert rows["H3"][-2:] == ["", "holds"]  # read from its interval
    assert rows["H1"][-2:] == [None, "not run"]
