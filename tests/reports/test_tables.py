"""Tables from files: the right numbers in the right cells, "not run", and the same bytes."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
from prediction_rows import prediction, write_rows

from egm_lib.data import eval_splits, split_id
from egm_lib.errors import InputError
from egm_lib.evaluation.results import Results, paper, paper_models
from egm_lib.evaluation.scoring import load_predictions
from egm_lib.files import read_jsonl
from egm_lib.reports.findings import findings
from egm_lib.reports.readme import numbers
from egm_lib.reports.tables import TABLES, build_tables
from egm_lib.reports.tables.beyond_paper import latency_stats
from egm_lib.reports.tables.cells import (
    Number,
    Row,
    Table,
    decimal_text,
    read_summary,
    to_latex,
    to_markdown,
)

PER_SPLIT = 10


@pytest.fixture
def run_root(tmp_path):
    """small-base solves the first 5 of each split, small-egm the last 8, large-base the first 7."""
    root = tmp_path / "toy-0"
    solved = {"small-base": range(5), "small-egm": range(2, 10), "large-base": range(7)}
    for task in ("vanilla", "amodal"):
        for dataset, split in eval_splits(task):
            for model, hits in solved.items():
                rows = [
                    prediction(task, dataset, split, n, model, n in hits, 0)
                    for n in range(PER_SPLIT)
                ]
                write_rows(root / "predictions" / model / f"{split_id(dataset, split)}.jsonl", rows)
    judged = [
        (5, "COMPLEX-PROMPT"),
        (6, "COMPLEX-PROMPT"),
        (7, "COMPLEX-PROMPT"),
        (8, "SMALL-OBJECT"),
    ]
    failures = [
        {
            "sample_id": f"refcoco-val-{number}",
            "judge": judge,
            "cause": "OTHER" if judge == "c" else cause,
        }
        for judge in "abc"
        for number, cause in judged
    ]
    write_rows(root / "failures" / "small-base.jsonl", failures)
    write_rows(
        root / "latency" / "small-base.jsonl",
        [
            {
                "sample_id": f"s{n}",
                "model": "small-base",
                "latency_ms": many * 10.0 + n,
                "first_token_ms": 3.0,
                "device": "CPU",
                "reasoning_tokens": 5,
                "answer_tokens": 10,
                "concurrency": many,
            }
            for many in (1, 64)
            for n in range(11)
        ],
    )
    (root / "manifest.json").write_text(
        json.dumps({"git": "abc123", "hardware": "2 cores", "wall_seconds": {"sft": 60.0}})
    )
    (root / "selection.json").write_text(
        json.dumps({"learner": "small-sft", "n_hard": 12, "n_easy": 12})
    )
    return root


def cells(table: Table, label: str, source: str = "ours") -> list:
    [row] = [row for row in table.rows if (row.label, row.source) == (label, source)]
    return list(row.cells)


def test_accuracy_by_split_stands_below_the_papers_model(run_root, tmp_path):
    table = build_tables([run_root], tmp_path / "out", draws=200)["table4"]
    labels = [row.label for row in table.rows[:4]]
    assert labels == ["Qwen3-VL-8B-Thinking", "small-base", "EGM-Qwen3-VL-8B", "small-egm"]
    assert table.rows[0].cells[0].value == 91.0
    ours = cells(table, "small-base")
    assert [cell.value for cell in ours[:9]] == [50.0] * 9 and ours[9].value == 80
    assert ours[0].ci95[0] < 50 < ours[0].ci95[1]
    gain = cells(table, "small-egm - small-base", "ours, gain")
    assert (
        gain[8].value == pytest.approx(30)
        and gain[8].n == 80
        and gain[8].ci95[0] < 30 < gain[8].ci95[1]
    )
    published = cells(table, "EGM-Qwen3-VL-8B - Qwen3-VL-8B-Thinking", "paper, gain")
    assert str(published[8]) == "+3.6"  # as the paper's Table 9 prints it


def test_failures_by_the_majority_of_judges(run_root, tmp_path):
    tables = build_tables([run_root], tmp_path / "out", draws=200)
    [complex_row] = [row for row in tables["table1"].rows if row.label == "COMPLEX-PROMPT"]
    assert complex_row.cells[0].value == 62.8  # the paper's
    assert complex_row.cells[1].value == pytest.approx(75) and complex_row.cells[2] is None
    # Of the complex failures 5, 6, 7 it solves 5 and 6
    solved = cells(tables["table2"], "large-base")[0]
    assert solved.value == pytest.approx(200 / 3) and solved.n == 3
    third_judge = tables["table12"].columns.index("ours: c")
    [other] = [row for row in tables["table12"].rows if row.label == "OTHER"]
    assert other.cells[third_judge].value == 100
    # Judge c never agrees
    assert "0.0 % unanimous" in (tmp_path / "out" / "table12.md").read_text()


def test_solved_failures_and_losses_are_counted(run_root, tmp_path):
    failed, solved, share, dropped = cells(
        build_tables([run_root], tmp_path / "o", draws=99)["table11"], "small-egm"
    )
    # Loses 0 and 1 of five
    assert (failed.value, solved.value, share.value, dropped.value) == (40, 40, 100, 40)


def test_what_was_not_run_says_so(run_root, tmp_path):
    tables = build_tables([run_root], tmp_path / "out", draws=99)
    assert cells(tables["table10"], "small-egm-no-reasoning")[:9] == [None] * 9
    assert (
        "| small-egm-no-reasoning | ours | not run |"
        in (tmp_path / "out" / "table10.md").read_text()
    )
    assert cells(tables["table9"], "small, vanilla")[1] is None
    assert [row.cells[-1] for row in tables["table6"].rows] == ["not run"] * len(
        tables["table6"].rows
    )


def test_a_run_with_nothing_in_it_gives_tables_that_say_so(tmp_path):
    (tmp_path / "toy-0").mkdir()
    tables = build_tables([tmp_path / "toy-0"], tmp_path / "out")
    assert set(tables) == set(TABLES)
    ours = [
        cell
        for table in tables.values()
        for row in table.rows
        if row.source.startswith("ours")
        for cell in row.cells
    ]
    assert not any(isinstance(cell, Number) for cell in ours)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["acc_at_50"]["small-egm"] is None
    with pytest.raises(FileNotFoundError, match="no run in"):
        build_tables([tmp_path / "absent-0"], tmp_path / "out")


def test_a_mean_over_splits_needs_every_split(run_root, tmp_path):
    (run_root / "predictions" / "small-egm" / "refcocog_test.jsonl").unlink()
    tables = build_tables([run_root], tmp_path / "out", draws=99)
    row = cells(tables["table4"], "small-egm")
    assert row[7] is None and row[8] is None and row[0].value == 80
    assert (
        json.loads((tmp_path / "out" / "summary.json").read_text())["acc_at_50"]["small-egm"][
            "splits"
        ]
        == 7
    )


def test_summary_has_the_promised_keys_and_numbers(run_root, tmp_path):
    build_tables([run_root], tmp_path / "out", draws=200)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["profile"] == "toy" and summary["seeds"] == [0] and summary["git"] == "abc123"
    assert summary["hardware"] == "2 cores" and summary["wall_seconds"] == {"sft": 60.0}
    base = summary["acc_at_50"]["small-base"]
    assert base["mean"] == 0.5 and base["n"] == 80 and base["ci95"][0] < 0.5 < base["ci95"][1]
    assert summary["amodal_acc_at_50"]["large-base"]["mean"] == 0.7
    assert summary["differences"]["vanilla: small-egm - small-base"]["mean"] == pytest.approx(0.3)
    assert summary["complex_share_of_failures"]["small-base"]["mean"] == 0.75
    assert (
        summary["latency_ms"]["small-base"]["mean"] == 15
        and summary["latency_ms"]["small-base"]["p50"] == 15
    )
    assert summary["tokens"]["small-base"] == {"reasoning": 5, "answer": 10, "mean": 15}
    assert summary["latency_ms"]["small-egm"] is None


def test_an_endpoint_that_does_not_tell_reasoning_apart_has_token_counts(run_root):
    """All of its tokens stand as the answer's; without any count there is none, not "nan"."""
    path = run_root / "latency" / "small-base.jsonl"
    rows = [row | {"reasoning_tokens": None} for row in read_jsonl(path)]
    write_rows(path, rows)
    assert latency_stats(Results([run_root]), "small-base")["tokens"] == 10
    write_rows(path, [row | {"answer_tokens": None} for row in rows])
    results = Results([run_root])
    assert latency_stats(results, "small-base")["tokens"] is None
    assert findings(results, "latency") == "`small-base` takes 15 ms."


def test_a_third_size_is_compared_where_it_answered(run_root, tmp_path):
    """Few profiles have one: a row of "not run" would tell their readers nothing."""

    def differences() -> Table:
        return build_tables([run_root], tmp_path / "out", draws=200)["table4_differences"]

    name = "small-egm - huge-base, vanilla"
    assert name not in [row.label for row in differences().rows]
    for dataset, split in eval_splits("vanilla"):
        rows = [prediction("vanilla", dataset, split, n, "huge-base", n < 6, 0) for n in range(10)]
        write_rows(run_root / f"predictions/huge-base/{split_id(dataset, split)}.jsonl", rows)
    assert cells(differences(), name)[0].value == pytest.approx(20)


def test_several_seeds_are_pooled(run_root, tmp_path):
    second = tmp_path / "toy-1"
    for dataset, split in eval_splits("vanilla"):
        rows = [
            prediction("vanilla", dataset, split, n, "small-base", n < 9, 1)
            for n in range(PER_SPLIT)
        ]
        write_rows(
            second / "predictions" / "small-base" / f"{split_id(dataset, split)}.jsonl", rows
        )
    table = build_tables([run_root, second], tmp_path / "out", draws=200)["table4"]
    mean = cells(table, "small-base")[8]
    assert mean.value == pytest.approx(70) and mean.n == 160
    # The seeds differ by 40 points, and the interval knows
    assert mean.ci95[0] < 52 and mean.ci95[1] > 88
    gain = cells(table, "small-egm - small-base", "ours, gain")[8]
    assert gain.n == 80  # paired within the seed that has both


def test_failures_of_two_seeds_are_marked_as_a_sum(run_root, tmp_path):
    shutil.copytree(run_root, second := tmp_path / "toy-1")
    for roots, counted in (
        ([run_root], "4 failures;"),
        ([run_root, second], "8 failures summed over 2 seeds;"),
    ):
        table = build_tables(roots, tmp_path / "out", draws=99, only=["table1"])["table1"]
        assert f"small-base: {counted}" in table.notes[0]


def test_counts_of_data_are_the_first_seeds_and_say_so(run_root, tmp_path):
    shutil.copytree(run_root, second := tmp_path / "toy-1")
    (second / "selection.json").write_text(json.dumps({"learner": "small-sft", "n_hard": 99}))
    for roots, notes in (([run_root], []), ([run_root, second], ["Ours: seed 0."])):
        tables = build_tables(roots, tmp_path / "out", draws=99, only=["table3", "table7"])
        assert [cell.value for cell in cells(tables["table7"], "n_hard")] == [12]
        assert tables["table3"].notes[:1] == notes and tables["table7"].notes[1:2] == notes


def test_settings_of_seeds_are_stated_where_their_profiles_differ(run_root, tmp_path):
    shutil.copytree(run_root, second := tmp_path / "toy-1")
    for root, beta, device_option in ((run_root, 0.1, {}), (second, 0.2, {"tensor_parallel": 1})):
        values = {
            "grpo": {"num_generations": 8, "beta": beta, "top_k": None, "max_steps": 25},
            "generation": device_option,
        }
        (root / "manifest.json").write_text(json.dumps({"git": "abc123", "values": values}))
        write_rows(root / "logs" / "grpo-vanilla.jsonl", [{"step": 1}])
    table = build_tables([run_root, second], tmp_path / "out", draws=99, only=["table6"])["table6"]
    ours = {row.label: row.cells[-1] for row in table.rows}
    assert (ours["completions a prompt"], ours["KL weight"], ours["rollout top_k"]) == (
        "8",
        "0.1 / 0.2",
        "none",
    )
    assert ours["learning rate"] == "not run" and ours["steps, where they end it earlier"] == "25"
    # A seed that was not trained has no settings to state
    (second / "logs" / "grpo-vanilla.jsonl").unlink()
    table = build_tables([run_root, second], tmp_path / "out", draws=99, only=["table6"])["table6"]
    assert {row.label: row.cells[-1] for row in table.rows}["KL weight"] == "0.1"


def test_the_same_files_give_the_same_bytes(run_root, tmp_path):
    for name in ("first", "second"):
        build_tables([run_root], tmp_path / name, draws=99)
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert first == second
    written = {name.rpartition(".")[0] for name in first} - {"summary"}
    # Nothing of these was run
    assert set(TABLES) - written == {
        "ablation_grpo",
        "hypotheses",
        "prompts",
        "table4_samples",
        "table4_validation",
        "table4_ways",
    }
    assert len(first) == 3 * len(written) + 1


def test_a_table_that_says_only_not_run_is_removed(run_root, tmp_path):
    old = tmp_path / "out" / "ablation_grpo.md"
    old.parent.mkdir()
    old.write_text("of an earlier run")
    tables = build_tables([run_root], tmp_path / "out", draws=99)
    assert not tables["ablation_grpo"].was_run and not old.exists()
    build_tables([run_root], tmp_path / "out", draws=99, only=["ablation_grpo"])
    assert "not run" in old.read_text()  # whoever asks for it by name gets it


def test_what_the_paper_does_not_give_is_not_reported(run_root, tmp_path):
    table = build_tables([run_root], tmp_path / "out", draws=99, only=["table9"])["table9"]
    assert "not reported" in cells(table, table.rows[0].label, "paper")


def odd_rows(run: Path) -> list[Path]:
    """Adds to a run's files what killed processes and strangers leave in them."""
    files = [*run.rglob("*.jsonl")]
    for file in files:
        with open(file, "ab") as torn:
            torn.write(b'null\n[1]\n{"sample_id": "odd"}\n{"sample_id": "torn", "expr\xc3')
    return files


def test_odd_and_torn_rows_do_not_change_a_table(run_root, tmp_path, caplog):
    write_rows(
        run_root / "traces" / "vanilla.jsonl",
        [{"sample_id": "t", "image_id": "1", "reasoning": "one two"}],
    )
    build_tables([run_root], tmp_path / "whole", draws=99)
    assert odd_rows(run_root)
    build_tables([run_root], tmp_path / "torn", draws=99)
    for table in ("table4", "table5", "table11", "table1", "table4_latency", "table4_answers"):
        whole, torn = ((tmp_path / name / f"{table}.csv").read_text() for name in ("whole", "torn"))
        assert whole == torn, table
    assert "left out" in caplog.text


def test_a_manifest_of_the_wrong_shape_is_named(run_root, tmp_path):
    (run_root / "manifest.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="manifest.json holds a list, not an object"):
        build_tables([run_root], tmp_path / "out", draws=99)


def test_csv_has_one_line_a_cell_with_profile_and_revision(run_root, tmp_path):
    build_tables([run_root], tmp_path / "out", draws=99, only=["table4"])
    with open(tmp_path / "out" / "table4.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    [line] = [one for one in lines if one["row"] == "small-base" and one["column"] == "mean of 8"]
    assert (line["value"], line["n"], line["profile"], line["git"]) == ("50", "80", "toy", "abc123")
    assert float(line["low"]) < 50 < float(line["high"])
    assert not (tmp_path / "out" / "table5.md").exists()


def test_another_rule_scores_the_same_files(run_root, tmp_path):
    strict = cells(build_tables([run_root], tmp_path / "a", draws=99)["table4"], "small-base")[
        0
    ].value
    other = cells(
        build_tables([run_root], tmp_path / "b", rule="lmms-eval", draws=99)["table4"], "small-base"
    )[0].value
    assert strict == 50 and other == 0  # lmms-eval reads 0-1 coordinates


def test_runs_of_two_profiles_are_not_pooled(tmp_path):
    for name in ("mini-0", "paper-0"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="several profiles"):
        Results([tmp_path / "mini-0", tmp_path / "paper-0"])


def test_paper_rows_average_to_what_the_paper_prints():
    for name in ("table4", "table10"):
        for row in paper(name)["rows"]:
            assert len(row["values"]) == 8
            assert math.isclose(sum(row["values"]) / 8, row["mean_of_splits"], abs_tol=0.006)
            # Two rows of the paper are off by one digit's rounding
            if row["mean_printed"] is not None:
                assert math.isclose(row["mean_of_splits"], row["mean_printed"], abs_tol=0.06)
    names = {row["name"] for row in paper("table4")["rows"]} | {
        row["name"] for row in paper("table10")["rows"]
    }
    for row in paper("models")["rows"]:
        assert set(row["models"].values()) <= names


def test_real_models_are_compared_with_the_same_models_of_the_paper(run_root, tmp_path):
    assert paper_models("paper-qwen3vl-2b-released")[0]["small-egm"] == "EGM-Qwen3-VL-2B"
    assert paper_models("mini-full") == paper_models("smoke")
    real = run_root.rename(tmp_path / "eval-egm-4b-0")
    table = build_tables([real], tmp_path / "out", draws=99, only=["table4"])["table4"]
    assert cells(table, "small-egm", "ours - paper")[0].value == pytest.approx(80 - 93.5)
    assert "miniature" not in (tmp_path / "out" / "table4.md").read_text()


def test_counts_of_the_traces(run_root, tmp_path):
    rows = [
        {"sample_id": f"t{n}", "image_id": str(n // 3), "reasoning": "one two three"}
        for n in range(7)
    ]
    write_rows(run_root / "traces" / "vanilla.jsonl", rows)
    table = build_tables([run_root], tmp_path / "out", draws=99, only=["table3"])["table3"]
    assert [
        cells(table, name)[0].value for name in ("samples", "images", "words a trace, mean")
    ] == [7, 3, 3]
    assert (
        cells(table, "samples")[1] is None and cells(table, "samples", "paper")[0].value == 575_208
    )


def test_drop_rates_are_shares_of_the_answers(run_root, tmp_path):
    rows = [
        {"sample_id": f"t{n}", "status": status}
        for n, status in enumerate(("ok", "ok", "filtered", "failed"))
    ]
    write_rows(run_root / "curation" / "verify-train.jsonl", rows)
    table = build_tables([run_root], tmp_path / "out", draws=99, only=["table3"])["table3"]
    vanilla, amodal = cells(table, "expressions not verified, %")
    # A failed sample was not judged
    assert amodal.value == pytest.approx(100 / 3) and amodal.n == 3
    assert vanilla == "" and cells(table, "traces dropped by filters, %") == [None, None]


def test_numbers_are_rounded_half_away_from_zero():
    texts = {
        49.05: "49.1",
        100 * 0.48050: "48.1",
        -2.25: "-2.3",
        -0.04: "0.0",
        1234.5: "1,234.5",
        0.349999: "0.3",
    }
    assert {value: decimal_text(value) for value in texts} == texts
    assert [decimal_text(value, 1, signed=True) for value in (0.04, -0.04, 21.95)] == [
        "+0.0",
        "+0.0",
        "+22.0",
    ]
    assert decimal_text(1999.5, 0) == "2,000" and math.isnan(float(decimal_text(math.nan)))
    values = {"small-base": {"mean": 0.4905, "ci95": [0.46, 0.51449], "n": 2000, "splits": 8}}
    summary = {
        "profile": "mini",
        "seeds": [0, 1],
        "git": ["a", "b"],
        "acc_at_50": values,
        "amodal_acc_at_50": {},
    }
    text = numbers(summary)
    assert "| 49.1 [46.0, 51.4] | not run |" in text and "seeds 0, 1, revision a, b." in text


def test_markdown_and_latex_escape_what_would_break_them():
    table = Table(
        "table1",
        "50 % & more",
        ["a_b"],
        [Row("x|y", "ours", [Number(1.25, (1.0, 1.5))])],
        ["<note>"],
    )
    assert "| x/y | ours | 1.3 [1.0, 1.5] |" in to_markdown(table, "stamp")
    latex = to_latex(table, "git #1")
    assert (
        r"50 \% \& more" in latex
        and r"a\_b" in latex
        and r"git \#1" in latex
        and "$<$note$>$" in latex
    )


def test_half_a_surrogate_pair_in_an_answer_stops_no_table(run_root, tmp_path):
    """A data frame holds UTF-8 alone, and JSON may escape what is none."""
    file = next((run_root / "predictions" / "small-base").glob("*.jsonl"))
    rows = read_jsonl(file)
    for name in ("raw_answer", "expression"):
        rows[0][name] += "\ud83d"
    rows[0]["\ud83d"] = "\ud83d"
    write_rows(file, rows)
    judged = {"sample_id": rows[0]["sample_id"], "judge": "a", "cause": "OTHER"}
    write_rows(run_root / "failures" / "small-base.jsonl", [{**judged, "note": "\ud83d"}])
    build_tables([run_root], tmp_path / "out", draws=99)
    assert len(Results([run_root]).predictions) == len(load_predictions(run_root / "predictions"))


@pytest.mark.parametrize(
    "odd",
    [
        [],
        {},
        {"profile": "toy", "seeds": [0], "acc_at_50": [], "amodal_acc_at_50": {}},
        {"acc_at_50": {"small-egm": 0.5}},
        {"acc_at_50": {"small-egm": {"mean": None, "ci95": None, "n": 3}}},
        {"differences": {"a": {"mean": 0.1, "ci95": [0.1], "n": 3}}},
    ],
)
def test_a_summary_of_another_shape_is_one_sentence(tmp_path, odd):
    """README, gallery and the comparison with the committed results read it."""
    share = {"mean": 0.5, "ci95": None, "n": 3}
    good = {"profile": "toy", "seeds": [0], "acc_at_50": {"a": share}, "amodal_acc_at_50": {}}
    good["differences"] = {"b": {**share, "ci95": [0.1, 0.2]}, "c": None}
    file = tmp_path / "summary.json"
    assert read_summary(file) is None
    file.write_text(json.dumps(good))
    assert read_summary(file) == good
    file.write_text(json.dumps({**good, **odd} if odd and "seeds" not in odd else odd))
    with pytest.raises(
        InputError, match=r"summary.json is not a summary of results; make it again"
    ):
        read_summary(file)
