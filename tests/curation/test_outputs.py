"""Checked samples in, filtered answers out."""

import json
from collections import Counter

import httpx2
import pytest
from curation_world import completion, make_root, service

from egm_lib.curation.options import CurationError
from egm_lib.curation.outputs import JsonlSamples, examples, filter_quality, kept, kept_and_dropped
from egm_lib.mini.teacher import TeacherTransport


def test_the_filters_catch_the_teachers_planted_errors(tmp_path, run):
    samples = make_root(tmp_path, 400)
    run("trace", samples, skip_filters=["coordinates", "too-many-sentences"])
    run("amodal-trace", samples)
    eye = TeacherTransport(tmp_path / "teacher.jsonl")
    for task in ("trace", "amodal-trace"):
        planted = {
            sample["sample_id"]: eye.planted_error(sample["sample_id"], task) for sample in samples
        }
        assert set(planted.values()) == {*eye.error_rates[task], None}  # every kind occurs
        quality = filter_quality(run.out(task), planted)
        assert quality.loc["any", "precision"] == quality.loc["any", "recall"] == 1.0, quality


def test_kept_and_dropped_table_and_examples(tmp_path, run):
    run("verify", make_root(tmp_path, 20))
    table = kept_and_dropped(run.out("verify"))["verify (mini-teacher)"]
    assert table["kept"] == 16 and table["rejected"] == 4
    shown = examples(run.out("verify"), count=2)
    assert Counter(shown["reason"]) == {"kept": 2, "rejected": 2}


def test_an_image_of_another_size_fails_alone(tmp_path, run):
    samples = make_root(tmp_path, 3)
    samples[1]["width"] = 130
    samples[2]["image"] = "images/none.png"
    report = run("verify", samples)
    assert report.failed == 2 and report.asked == 1
    errors = [row["error"] for row in run.rows("verify")]
    assert "130 x 96" in errors[1] and "none.png" in errors[2]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gt_box": None}, "no 'gt_box'"),
        ({"gt_box": [5, 5, 1, 9]}, "is not a box"),
        ({"modal_box": None}, "no 'modal_box', which amodal-trace needs"),
        ({"sample_id": 7}, "sample_id = 7 is not of type str"),
        ({"width": "128"}, "width = '128' is not of type int"),
        ({"height": 0}, "height = 0 is not a size in pixels"),
    ],
)
def test_bad_input_is_named_before_anything_is_paid(tmp_path, run, change, words):
    samples = make_root(tmp_path, 3)
    samples[2] |= change
    with pytest.raises(CurationError, match=f"sample 3.*{words}"):
        run("amodal-trace", samples)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_model_that_thinks_within_its_reply(tmp_path, run, monkeypatch):
    """Filters read the answer alone: the reasoning may speak of the box."""
    text = "<think>The green box is at [1, 2, 3, 4]. I'm sorry. One. Two.</think>The left circle."
    answering = service(lambda _: httpx2.Response(200, json=completion(text)), monkeypatch)
    run("trace", make_root(tmp_path, 1), answering)
    row = run.rows("trace")[0]
    assert (row["status"], row["answer"], row["raw"]) == ("ok", "The left circle.", text)
    cut = service(lambda _: httpx2.Response(200, json=completion("<think>The le")), monkeypatch)
    run("trace", make_root(tmp_path, 1), cut, ledger=tmp_path / "other.jsonl")
    assert run.rows("trace")[0]["filter"] == "empty"


def test_predictions_with_an_empty_box_are_judged(tmp_path, run):
    samples = make_root(tmp_path, 4)
    samples[0]["box"], samples[1]["box"], samples[2]["box"] = [0, 0, 0, 0], [9, 9, 9, 20], None
    assert run("failure", samples).kept == 4


@pytest.mark.parametrize("box", [[1, 2, 3], "1234", [1, 2, 3, float("nan")], 7, [1, 2, 3, "4"]])
def test_what_is_no_prediction_at_all_is_named(tmp_path, run, box):
    samples = make_root(tmp_path, 2)
    samples[1]["box"] = box
    with pytest.raises(CurationError, match="sample 2 .* is not a box of a prediction"):
        run("failure", samples)


def test_odd_lines_of_samples_are_left_out_by_name(tmp_path, run, caplog):
    samples = make_root(tmp_path, 4)
    samples[1]["expression"] = "the \u2028 red \x85 circle"  # no end of a line
    lines = [json.dumps(sample, ensure_ascii=False).encode() for sample in samples]
    file = tmp_path / "samples.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join([*lines[:3], b"[1, 2]", b"\xff{", b"", lines[3]]))
    assert run("verify", JsonlSamples(file)).kept == 3  # s0 is rejected
    assert [row["sample_id"] for row in run.rows("verify")] == ["s0", "s1", "s2", "s3"]
    assert "line 4 is left out" in caplog.text and "line 5 is left out" in caplog.text
    file.write_text("[\n  1\n]")
    with pytest.raises(CurationError, match="holds no JSON lines"):
        run("verify", JsonlSamples(file))


def test_odd_rows_of_an_output_are_left_out(tmp_path, run, caplog):
    samples = make_root(tmp_path, 6)
    run("verify", samples)
    rows = run.out("verify").read_bytes().splitlines(keepends=True)
    odd = [b"7\n", b"{}\n", b'{"sample_id": 3, "status": "ok"}\n']
    # The last line is torn
    run.out("verify").write_bytes(b"".join([*rows[:3], *odd, *rows[3:5], rows[5][:40]]))
    assert [sample["sample_id"] for sample in kept(samples, run.out("verify"), "verdict")] == [
        "s1",
        "s2",
        "s3",
        "s4",
    ]
    assert kept_and_dropped(run.out("verify")).sum().item() == 5
    assert "without sample_id or status" in caplog.text
