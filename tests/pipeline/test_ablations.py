"""Ablations differ from the run only in what they state, and never touch a test split."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from engine_world import FakeEngine, sample
from PIL import Image
from prediction_rows import prediction, write_rows

from egm_lib.data import EVAL_SPLITS, read_validation, write_samples
from egm_lib.evaluation.results import Results
from egm_lib.inference.decoding import decoded_as
from egm_lib.pipeline import ablations
from egm_lib.pipeline.ablations import answers_file, variant_run
from egm_lib.profile import load_profile
from egm_lib.reports.tables import build_tables
from egm_lib.run import Run
from egm_lib.training.variants import VARIANTS


@pytest.fixture
def run():
    return Run(load_profile("mini"), 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_from_the_run_only_in_what_it_states(run, name):
    varied, variant = variant_run(run, name, 7), VARIANTS[name]
    expected = asdict(run.profile) | {
        "grpo": asdict(run.profile.grpo) | {"max_steps": 7, "max_minutes": None}
    }
    expected["grpo"] |= variant.changes or {}
    assert asdict(varied.profile) == expected and varied.seed == run.seed
    assert varied.samples("rl_vanilla") == run.samples("rl_vanilla")
    base = {"small-base": "data/mini/small", "small-sft": "checkpoints/vanilla/small-sft"}[
        variant.start
    ]
    # What egm_lib.grpo starts from
    assert str(varied.checkpoint("vanilla", "small-sft")).endswith(base)


def test_a_variant_writes_into_its_folder_alone(run):
    places = set()
    for name in VARIANTS:
        for steps in (7, 8):
            varied = variant_run(run, name, steps)
            written = (
                varied.checkpoint("vanilla", "small-egm"),
                varied.log("grpo-vanilla.jsonl"),
                varied.groups("vanilla"),
            )
            places |= {*written, answers_file(run, name, steps)}
    assert len(places) == 4 * 2 * len(VARIANTS)
    assert all(place.is_relative_to(run.root / "ablations") for place in places)


def test_the_validation_split_is_not_a_test_split(tmp_path):
    sample = {
        "sample_id": "v1",
        "dataset": "refcoco",
        "split": "validation",
        "task": "vanilla",
        "image": "a.png",
        "width": 9,
        "height": 9,
        "expression": "it",
        "gt_box": [0.0, 0.0, 5.0, 5.0],
        "image_id": "a",
        "flipped": False,
    }
    write_rows(
        tmp_path / "eval" / "refcoco_val.jsonl", [sample | {"sample_id": "r1", "split": "val"}]
    )
    # Real data: RefCOCO's own
    assert [row["sample_id"] for row in read_validation(tmp_path)] == ["r1"]
    write_rows(tmp_path / "validation.jsonl", [sample])
    assert [row["sample_id"] for row in read_validation(tmp_path)] == ["v1"]
    assert ("refcoco", "validation") not in EVAL_SPLITS


def test_the_table_compares_with_the_whole_and_says_what_was_not_run(tmp_path):
    root = tmp_path / "mini-0"
    for name, solved in {"sft": 5, "sft-and-grpo": 8}.items():
        rows = [
            prediction("vanilla", "refcoco", "validation", n, name, n < solved, 0)
            for n in range(10)
        ]
        write_rows(root / "ablations" / "40-steps" / "answers" / f"{name}.jsonl", rows)
    table = build_tables([root], tmp_path / "out", draws=200, only=["ablation_grpo"])[
        "ablation_grpo"
    ]
    cells = {row.label: dict(zip(table.columns, row.cells, strict=True)) for row in table.rows}
    assert list(cells) == list(VARIANTS)
    assert (
        cells["sft"]["accuracy"].value == pytest.approx(50)
        and cells["sft"]["accuracy"].ci95 is not None
    )
    assert cells["sft"]["difference"].value == pytest.approx(-30) and cells["sft"]["n"].value == 10
    assert cells["sft"]["GRPO steps"].value == 0 and cells["sft-and-grpo"]["GRPO steps"].value == 40
    assert set(cells["without-kl"].values()) == {None}
    text = (tmp_path / "out" / "ablation_grpo.md").read_text()
    assert "| without-kl | ours | not run |" in text
    assert Results([root]).models == []  # the run's own tables do not see these answers


def test_without_a_finished_run_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations.Run, "root", property(lambda self: tmp_path / "nowhere-0"))
    assert ablations.main(["--profile", "smoke"]) == 2
    assert "make reproduce PROFILE=smoke" in capsys.readouterr().err
    assert json.dumps(sorted(map(str, tmp_path.rglob("*")))) == "[]"


@pytest.mark.parametrize("way", ablations.DECODINGS)
def test_every_way_to_decode_is_one_that_the_engine_knows(way):
    engine = SimpleNamespace(family=None, revision=None)
    assert decoded_as(engine, f"small-egm@{way}").number == int(way.rpartition("-")[2])


def test_every_variant_is_trained_and_every_way_to_decode_is_run(
    run, tmp_path, monkeypatch, capsys
):
    asked, figures = [], tmp_path / "figures"
    monkeypatch.setattr(ablations.Run, "figures", property(lambda self: figures))
    for name in ("ablation_grpo", "table4_decoding"):
        write_rows(figures / f"{name}.md", [{"table": name}])
    monkeypatch.setattr(
        ablations, "run_jobs", lambda run, jobs: asked.extend(job.name for job in jobs)
    )
    for name in ("require_checkpoint", "require_file", "build_tables"):
        monkeypatch.setattr(ablations, name, lambda *args, **options: None)
    ablations.run_all(run, 7)
    trained = [name for name, variant in VARIANTS.items() if variant.changes is not None]
    shards = [f"{shard}-of-{run.profile.launch.prediction_workers}" for shard in (1, 2)]
    expected = [f"ablations-7-{name}" for name in trained]
    expected += [f"ablations-small-egm-{shard}" for shard in shards]
    ways = "-".join(f"small-egm@{way}" for way in ablations.DECODINGS)
    expected += [f"predict-{ways}-{shard}" for shard in shards]
    assert sorted(asked) == sorted(expected)
    printed = capsys.readouterr().out
    assert "ablation_grpo" in printed and "table4_decoding" in printed


def test_variants_are_asked_with_the_prompt_of_the_evaluation(run, tmp_path, monkeypatch):
    Image.new("RGB", (64, 48)).save(tmp_path / "0.png")
    write_samples(tmp_path / "validation.jsonl", [sample(0)])
    profile = replace(
        run.profile,
        data=replace(run.profile.data, root=str(tmp_path)),
        evaluation=replace(run.profile.evaluation, prompt="qwen-refcoco"),
    )
    monkeypatch.setattr(Run, "root", property(lambda run: tmp_path / "run"))
    engines = []

    def make_engine(*args) -> FakeEngine:
        engines.append(FakeEngine())
        return engines[-1]

    monkeypatch.setattr(ablations, "make_engine", make_engine)
    ablations.answer(Run(profile, 0), 7)
    prompt = FakeEngine.family.prompt(sample(0)["expression"], "vanilla", name="qwen-refcoco")
    assert [engine.prompts for engine in engines] == [[prompt]] * len(VARIANTS)
    assert all(engine.closed for engine in engines)
