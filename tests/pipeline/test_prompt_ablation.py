"""`make prompts` asks one model with each named prompt that it can read, and compares answers."""

import json
from dataclasses import replace

import pytest
from engine_world import FakeEngine, sample
from PIL import Image
from prediction_rows import prediction, write_rows
from tiny_qwen import tiny_qwen

from egm_lib.data import EVAL_SPLITS, split_id
from egm_lib.errors import InputError
from egm_lib.inference import predict as predict_module
from egm_lib.inference.from_profile import prompt_of
from egm_lib.mini.tokens import build_tokenizer
from egm_lib.pipeline import prompt_ablation
from egm_lib.pipeline.prompt_ablation import named_prompts, unknown_words, why_not_asked
from egm_lib.profile import load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.reports.tables import build_tables
from egm_lib.run import Run

QWEN, INTERNVL = FAMILIES["qwen3-vl"], FAMILIES["internvl-3"]
SPLIT = split_id(*EVAL_SPLITS[0])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The smoke profile in a folder of its own, with two samples of one split."""
    monkeypatch.setattr(Run, "root", property(lambda self: tmp_path / "smoke-0"))
    monkeypatch.setattr(Run, "figures", property(lambda self: tmp_path / "figures"))
    monkeypatch.setattr(Run, "roots", property(lambda self: [self.root]))
    data, (dataset, split) = tmp_path / "data", EVAL_SPLITS[0]
    rows = [
        sample(number, dataset=dataset, split=split, expression="the red circle")
        for number in range(2)
    ]
    write_rows(data / "eval" / f"{SPLIT}.jsonl", rows)
    for number in range(2):
        Image.new("RGB", (64, 48)).save(data / f"{number}.png")
    profile = load_profile("smoke")
    profile = replace(
        profile, data=replace(profile.data, root=str(data)), tasks=("vanilla",), seeds=(0,)
    )
    return Run(profile, 0)


@pytest.mark.parametrize("name", QWEN.prompts)
def test_the_model_is_asked_with_the_prompt_that_its_name_asks_for(run, monkeypatch, name):
    asked = []

    class Engine(FakeEngine):
        def answer(self, requests, sampling, *, reasoning=True):
            asked.extend(request.prompt for request in requests)
            return super().answer(requests, sampling, reasoning=reasoning)

        def close(self):
            pass

    monkeypatch.setattr(predict_module, "run_of", lambda args: run)
    monkeypatch.setattr(predict_module, "make_engine", lambda *args, **options: Engine())
    model = f"small-base@prompt-{name}"
    assert predict_module.main(["--model", model, "--task", "vanilla", "--split", SPLIT]) == 0
    text = QWEN.prompts[name]["vanilla"].replace("{expression}", "the red circle")
    assert asked == [text] * 2
    lines = run.predictions(model, SPLIT).read_text().splitlines()
    assert [(row["model"], row["prompt"]) for row in map(json.loads, lines)] == [(model, text)] * 2


def test_a_model_without_such_a_prompt_is_refused_before_it_is_loaded(run, monkeypatch, capsys):
    def never(*args, **options):
        raise AssertionError("the engine was made")

    monkeypatch.setattr(predict_module, "run_of", lambda args: run)
    monkeypatch.setattr(predict_module, "make_engine", never)
    assert predict_module.main(["--model", "small-base@prompt-authors"]) == 2
    assert "no prompt 'authors' for the task vanilla" in capsys.readouterr().err
    profile = run.profile
    asked = (profile, "small-base@prompt-qwen-refcoco", profile.models.small)
    assert prompt_of(*asked, ["vanilla"]) == "qwen-refcoco"
    with pytest.raises(InputError, match="task amodal: use one of authors-sft, authors-eval"):
        prompt_of(*asked, ["vanilla", "amodal"])
    plain = prompt_of(profile, "small-base@sample-1", profile.models.small, ["vanilla"])
    assert plain == profile.evaluation.prompt


def test_the_miniature_knows_its_own_prompt_alone(run):
    """Its vocabulary has the whole sentence of authors-sft, and lacks the words of the others."""
    own, *others = named_prompts(run, "small-base", "vanilla")
    assert own["prompt"] == "authors-sft" and own["answers"] == "small-base"
    assert own["not_asked"] is None
    assert [row["answers"] for row in others] == [
        "small-base@prompt-authors-eval",
        "small-base@prompt-qwen-refcoco",
    ]
    assert "does not know 'output', 'its', 'bbox' and 4 more" in others[0]["not_asked"]
    assert "does not know 'every', 'object', 'matches'" in others[1]["not_asked"]


def test_unknown_words_of_the_sample_are_not_held_against_the_prompt():
    tokenizer = build_tokenizer()
    assert unknown_words(tokenizer, "the red zebra, the zebra") == ["zebra"]
    ask = (QWEN, "vanilla", "authors-sft", {}, "the red zebra", tokenizer)
    assert why_not_asked(*ask) is None


def test_a_byte_level_tokenizer_knows_every_prompt():
    """As those of Qwen3-VL and InternVL-3 do."""
    tokenizer = tiny_qwen()[1].tokenizer
    for name in QWEN.prompts:
        assert why_not_asked(QWEN, "vanilla", name, {}, "a cup", tokenizer) is None


def test_a_prompt_that_the_family_lacks_or_that_repeats_another_is_not_asked():
    amodal = why_not_asked(QWEN, "amodal", "qwen-refcoco", {}, "a cup", None)
    assert amodal == "qwen3-vl has none for the task amodal"
    text = INTERNVL.prompts["authors-sft"]["vanilla"]
    same = why_not_asked(INTERNVL, "vanilla", "authors-eval", {text: "authors-sft"}, "a cup", None)
    assert same == "the same text as authors-sft"


def test_only_prompts_that_can_be_read_are_asked_and_the_table_names_the_others(
    run, monkeypatch, capsys
):
    jobs = []
    monkeypatch.setattr(prompt_ablation, "run_jobs", lambda run, new: jobs.extend(new))
    prompt_ablation.run_all(run, "small-base")
    for job in jobs:
        models = [word for word in job.command if word.startswith("small-base")]
        assert models == ["small-base"] and job.command.count("vanilla") == 1
    printed = capsys.readouterr().out
    assert "small-base, vanilla: authors-eval | ours | not asked: the model's tokenizer" in printed
    assert {path.name for path in run.figures.iterdir()} == {
        "prompts.md",
        "prompts.csv",
        "prompts.tex",
    }


def test_the_table_pairs_each_prompt_with_the_profile_s_own(tmp_path):
    """Differences by hand: of 20 samples, 10 are solved under the own prompt and 15 under the
    other.
    """
    root = tmp_path / "mini-0"
    named = {
        "authors-sft": ("small-base", 10),
        "authors-eval": ("small-base@prompt-authors-eval", 15),
    }
    stated = []
    for name, (answers, solved) in named.items():
        dataset, split = EVAL_SPLITS[0]
        rows = [
            prediction("vanilla", dataset, split, number, answers, number < solved, 0)
            for number in range(20)
        ]
        write_rows(root / "predictions" / answers / f"{SPLIT}.jsonl", rows)
        stated.append({"prompt": name, "answers": answers, "not_asked": None})
    stated.append(
        {"prompt": "qwen-refcoco", "answers": "small-base@prompt-qwen-refcoco", "not_asked": "why"}
    )
    rows = [{"model": "small-base", "task": "vanilla", **row} for row in stated]
    write_rows(root / "ablations" / "prompts" / "small-base.jsonl", rows)
    tables = build_tables([root], tmp_path / "out", draws=500)
    own, other, left_out = tables["prompts"].rows
    assert own.label == "small-base, vanilla: authors-sft (the profile's own)"
    accuracy, difference, count = own.cells
    assert (accuracy.value, difference, count.value) == (pytest.approx(50), "", 20)
    accuracy, difference, count = other.cells
    assert (accuracy.value, difference.value) == (pytest.approx(75), pytest.approx(25))
    low, high = difference.ci95
    assert 0 <= low < 25 < high <= 100
    assert left_out.cells == ["not asked: why", "", ""]
    # Another prompt is not another way to decode
    assert [row.label for row in tables["table4_decoding"].rows] == ["small-egm"]


def test_without_such_a_run_there_is_no_table(tmp_path):
    (tmp_path / "mini-0").mkdir()
    tables = build_tables([tmp_path / "mini-0"], tmp_path / "out", draws=50)
    assert not tables["prompts"].was_run and not (tmp_path / "out" / "prompts.md").exists()


def test_a_variant_of_a_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        prompt_ablation.main(["--profile", "smoke", "--model", "small-base@sample-1"])
    assert "name a model without @" in capsys.readouterr().err
