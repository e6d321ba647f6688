"""Prediction files: complete, in order, and the same after a kill."""

import json
import types
import typing
from dataclasses import replace
from types import SimpleNamespace

import pytest
from engine_world import FakeEngine, run, sample

from egm_lib.data import write_samples
from egm_lib.data.records import Prediction
from egm_lib.evaluation.scoring import SCORING_COLUMNS, load_predictions, score
from egm_lib.inference import predict as predict_module
from egm_lib.inference.predict import EngineFailure
from egm_lib.profile import load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.run import Run


def test_rows_carry_sample_prompt_and_boxes_in_pixels(images):
    [row] = run(FakeEngine(), [sample(1)], images, images / "out.jsonl")
    prompt = FAMILIES["qwen3-vl"].prompt(sample(1)["expression"], "vanilla")
    assert row["prompt"] == prompt and row["reasoning"] == "look" and row["status"] == "ok"
    assert row["box"] == pytest.approx([0, 0, len(prompt) * 64 / 1000, 24.0])
    assert row["frame"] == "norm_1000" and row["revision"] == "r1"
    assert {"iou", "success"}.isdisjoint(row)
    assert set(sample(1)) <= set(row)


def is_a(value: object, hint: object) -> bool:
    """Whether a value is of an annotated type; the items of a list are not looked at."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(
        value in typing.get_args(option)
        if typing.get_origin(option) is typing.Literal
        else isinstance(value, typing.get_origin(option) or option)
        for option in options
    )


def test_a_row_has_the_declared_columns_and_types(images):
    """Even if the image cannot be read. Scoring asks for no column that is not declared."""
    declared = typing.get_type_hints(Prediction)
    (images / "1.png").write_bytes(b"not an image")
    rows = run(FakeEngine(), [sample(0), sample(1)], images, images / "out.jsonl")
    assert [row["status"] for row in rows] == ["ok", "error"]
    for row in rows:
        assert row.keys() == declared.keys()
        assert [name for name, hint in declared.items() if not is_a(row[name], hint)] == []
    assert set(SCORING_COLUMNS) <= declared.keys()


def test_a_killed_run_continues_and_leaves_the_same_file(images):
    samples = [sample(number) for number in range(50)]
    whole = images / "whole.jsonl"
    run(FakeEngine(), samples, images, whole)
    lines = whole.read_text().splitlines(keepends=True)
    for kept, torn in [(0, 30), (20, 0), (20, 40), (50, 0)]:
        out = images / f"killed-{kept}-{torn}.jsonl"
        out.write_text("".join(lines[:kept]) + "".join(lines[kept : kept + 1])[:torn])
        engine = FakeEngine()
        run(engine, samples, images, out)
        assert out.read_text() == whole.read_text()
        # What is finished is not asked again, but for one window
        assert engine.asked < 50 - kept + 16


def test_a_run_killed_before_its_first_rows_leaves_an_empty_file_that_is_none(images):
    """Tables and the viewer find no row in it; the next run fills it."""
    samples = [sample(number) for number in range(3)]
    run(FakeEngine(), samples, images, images / "whole.jsonl")
    folder = images / "predictions"
    out = folder / "small-base" / "refcoco_val.jsonl"

    def killed(prompt):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(FakeEngine(killed), samples, images, out)
    assert out.read_bytes() == b""
    assert load_predictions(folder).empty and score(load_predictions(folder)).empty
    run(FakeEngine(), samples, images, out)
    assert out.read_text() == (images / "whole.jsonl").read_text()


def test_a_damaged_row_is_asked_again(images):
    """Valid JSON without the fields of a row: the others are kept."""
    samples, whole, out = (
        [sample(n) for n in range(6)],
        images / "whole.jsonl",
        images / "odd.jsonl",
    )
    run(FakeEngine(), samples, images, whole)
    lines = whole.read_text().splitlines(keepends=True)
    odd = ["{}\n", '{"sample_id": ["a"], "status": "ok"}\n', '{"status": null}\n']
    out.write_text("".join([lines[0], *odd, *lines[2:]]))
    run(FakeEngine(), samples, images, out)
    assert out.read_text() == whole.read_text()


def test_rows_of_another_model_are_not_continued(images):
    out = images / "out.jsonl"
    run(FakeEngine(), [sample(0)], images, out)
    before = out.read_text()
    with pytest.raises(ValueError, match="written for model 'small-base'"):
        run(FakeEngine(), [sample(0)], images, out, model="large-base")
    assert out.read_text() == before


def test_a_corrupt_image_marks_its_row_and_the_run_continues(images):
    (images / "1.png").write_bytes(b"not an image")
    rows = run(FakeEngine(), [sample(number) for number in range(6)], images, images / "out.jsonl")
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok", "error", "ok"]
    assert (
        "1.png" in rows[1]["error"]
        and rows[1]["box"] is None
        and rows[1]["finish_reason"] == "error"
    )


def test_rows_with_errors_are_answered_again_only_on_request(images):
    samples, out = [sample(number) for number in range(6)], images / "out.jsonl"
    longest = FAMILIES["qwen3-vl"].prompt(sample(3)["expression"], "vanilla")
    rows = run(FakeEngine(lambda prompt: prompt == longest), samples, images, out)
    assert [row["sample_id"] for row in rows if row["status"] == "error"] == ["s3"]
    engine = FakeEngine()
    assert run(engine, samples, images, out) == rows and engine.asked == 0
    mended = run(FakeEngine(), samples, images, out, retry_errors=True)
    assert [row["sample_id"] for row in mended] == [row["sample_id"] for row in samples]
    assert all(row["status"] == "ok" for row in mended)


def test_an_engine_that_fails_everywhere_stops_the_run(images):
    with pytest.raises(EngineFailure, match="no memory"):
        run(
            FakeEngine(lambda prompt: True),
            [sample(0), sample(1)],
            images,
            images / "out.jsonl",
        )


def test_rows_of_answers_given_together_have_no_latency(images):
    engine = FakeEngine()
    rows = run(engine, [sample(0), sample(1)], images, images / "two.jsonl")
    assert [row["latency_ms"] for row in rows] == [None, None]
    engine.batch_size = 1
    [row] = run(engine, [sample(0)], images, images / "one.jsonl")
    assert row["latency_ms"] == 1.5


def test_samples_on_one_unreadable_image_do_not_end_a_run(images):
    """They never reached the engine, which is not at fault."""
    (images / "1.png").write_bytes(b"not an image")
    engine = FakeEngine()
    engine.batch_size, engine.window_batches = 1, 4
    samples = [sample(3 * number + 1) for number in range(4)] + [sample(0), sample(2)]
    rows = run(engine, samples, images, images / "out.jsonl")
    assert [row["status"] for row in rows] == ["error"] * 4 + ["ok"] * 2


@pytest.mark.parametrize(
    "options, words",
    [
        (["--split", "refcoco_testC"], "no split refcoco_testC; known: refcoco_val"),
        (["--validation", "--task", "amodal"], "leave --task out"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(capsys, options, words):
    with pytest.raises(SystemExit):
        predict_module.main(["--profile", "smoke", "--model", "small-base", *options])
    assert words in capsys.readouterr().err


def test_an_engine_is_closed_before_the_next_is_built(monkeypatch):
    """Two models do not fit one GPU."""
    events = []

    class Engine:
        def __init__(self, name):
            self.name = name
            events.append(f"open {name}")

        def close(self):
            events.append(f"close {self.name}")

    def fail_for_b(engine, *args):
        if engine.name == "b":
            raise RuntimeError("out of memory")

    names = iter("abc")
    for name in ("model_of", "prompt_of"):
        monkeypatch.setattr(predict_module, name, lambda *args: None)
    monkeypatch.setattr(predict_module, "make_engine", lambda *args, **more: Engine(next(names)))
    monkeypatch.setattr(predict_module, "_use_engine", fail_for_b)
    run = SimpleNamespace(profile=SimpleNamespace(tasks=("vanilla",)), seed=0)
    args = SimpleNamespace(model=["a", "b"], task=None, split=None, latency=False, validation=False)
    monkeypatch.setattr(predict_module, "run_of", lambda args: run)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_module._predict_all(args)
    assert events == ["open a", "close a", "open b", "close b"]


def test_the_validation_split_is_answered_beside_the_test_splits(images, monkeypatch):
    """Its answers are stored apart, and no test split is asked."""
    split = [sample(number) | {"split": "validation"} for number in range(3)]
    write_samples(images / "validation.jsonl", split)
    write_samples(images / "eval" / "refcoco_val.jsonl", [sample(9)])
    profile = load_profile("smoke")
    profile = replace(profile, data=replace(profile.data, root=str(images), eval_limit=1))
    run = Run(profile, 0)
    monkeypatch.setattr(Run, "root", property(lambda run: images / "run"))
    monkeypatch.setattr(predict_module, "run_of", lambda args: run)
    monkeypatch.setattr(predict_module, "make_engine", lambda *args, **options: FakeEngine())
    command = ["--profile", "smoke", "--validation"]
    for model in ("small-base", "small-base@sample-1"):
        assert predict_module.main([*command, "--model", model]) == 0
        rows = load_predictions(run.validation(model))
        assert rows["sample_id"].tolist() == [row["sample_id"] for row in split]
        assert set(rows["model"]) == {model}
    assert not (run.root / "predictions").exists()
    limited = ["--model", "small-base@sample-2", "--limit", "2"]
    assert predict_module.main([*command, *limited]) == 0
    assert len(load_predictions(run.validation("small-base@sample-2"))) == 2


@pytest.mark.parametrize("measured", [(), ("--latency", "--latency-samples", "1")])
def test_a_model_is_asked_with_the_profile_s_prompt(images, monkeypatch, measured):
    """And its rows say so."""
    samples = [sample(number) for number in range(6)]
    write_samples(images / "eval" / "refcoco_val.jsonl", samples)
    profile = load_profile("smoke")
    profile = replace(
        profile,
        data=replace(profile.data, root=str(images), eval_limit=None),
        evaluation=replace(profile.evaluation, prompt="qwen-refcoco"),
    )
    monkeypatch.setattr(Run, "root", property(lambda run: images / "run"))
    monkeypatch.setattr(predict_module, "run_of", lambda args: Run(profile, 0))
    engine = FakeEngine()
    monkeypatch.setattr(predict_module, "make_engine", lambda *args, **options: engine)
    command = ["--profile", "smoke", "--model", "small-base", "--split", "refcoco_val"]
    assert predict_module.main([*command, *measured]) == 0
    expected = {
        engine.family.prompt(row["expression"], "vanilla", name="qwen-refcoco") for row in samples
    }
    assert engine.prompts and set(engine.prompts) <= expected
    if not measured:
        lines = Run(profile, 0).predictions("small-base", "refcoco_val").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == engine.prompts
