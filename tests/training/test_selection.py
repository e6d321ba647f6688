"""The RL data of a run, from answers on files: which samples are kept, and what is counted."""

import json
from dataclasses import replace

import pytest
from engine_world import FakeEngine
from PIL import Image
from roots import use_root

from egm_lib.data import read_samples, write_samples
from egm_lib.errors import InputError
from egm_lib.profile import load_profile
from egm_lib.run import Run
from egm_lib.training import selection
from egm_lib.training.selection import (
    AT_RANDOM,
    ROLES,
    answer_pool,
    pool_answers,
    select,
    select_at_random,
)

HIT, MISS = "</think>\n\n[100, 100, 500, 500]", "</think>\n\n[600, 600, 900, 900]"
GT_BOX = [10.0, 10.0, 50.0, 50.0]  # px of 100 x 100


def sample(number, task="vanilla"):
    row = {
        "sample_id": f"s{number:02}",
        "dataset": "refcoco",
        "split": "selection",
        "task": task,
        "image": "a.png",
    }
    row |= {
        "width": 100,
        "height": 100,
        "expression": "the left one",
        "gt_box": GT_BOX,
        "image_id": str(number),
    }
    row |= {
        "modal_box": GT_BOX if task == "amodal" else None,
        "ann_id": None,
        "ref_id": None,
        "flipped": False,
    }
    return row | {"prompt_kind": "plain", "num_lookalikes": 1}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of the smoke profile over ten vanilla and three amodal samples."""
    use_root(monkeypatch, tmp_path)
    profile = load_profile("smoke")
    run = Run(replace(profile, selection=replace(profile.selection, fill_to=0)), 0)
    write_samples(profile.data.path / "selection.jsonl", [sample(number) for number in range(10)])
    write_samples(
        profile.data.path / "selection_amodal.jsonl",
        [sample(number, "amodal") for number in range(3)],
    )
    Image.new("RGB", (100, 100)).save(profile.data.path / "a.png")
    return run


def answer(run, role, solved, numbers=range(10)):
    rows = [
        sample(number)
        | {
            "raw_answer": HIT if number in solved else MISS,
            "frame": "NORM_1000",
            "status": "ok",
            "error": None,
        }
        | {
            "model": ROLES[role],
            "seed": 0,
            "profile": "smoke",
            "revision": None,
            "finish_reason": "stop",
        }
        for number in numbers
    ]
    path = pool_answers(run, role)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def kept(run, task="vanilla"):
    return set(read_samples(run.samples(f"rl_{task}"))["sample_id"])


def test_learnable_samples_and_as_many_easy_ones_are_selected(run):
    answer(run, "learner", {0, 1, 2, 3, 4})
    answer(run, "reference", {0, 1, 5, 6})
    counts = select(run)["vanilla"]
    assert counts == {
        "pool": 10,
        "both": 2,
        "learnable": 2,
        "learner_only": 3,
        "neither": 3,
        "easy": 2,
        "filled": 0,
        "kept": 4,
    }
    assert {"s05", "s06"} <= kept(run)
    assert kept(run) - {"s05", "s06"} <= {"s00", "s01", "s02", "s03", "s04"}
    assert json.loads((run.root / "selection.json").read_text())["vanilla"] == counts


def test_all_amodal_samples_are_kept_if_possible_verified_ones(run):
    answer(run, "learner", set())
    answer(run, "reference", {0})
    assert select(run)["amodal"] == {"pool": 3, "kept": 3}
    write_samples(run.samples("selection_amodal"), [sample(2, "amodal")])
    assert select(run)["amodal"]["kept"] == 1 and kept(run, "amodal") == {"s02"}


def test_the_amodal_task_alone_needs_no_vanilla_samples_and_no_answers(run):
    (run.profile.data.path / "selection.jsonl").unlink()
    alone = Run(replace(run.profile, tasks=("amodal",)), 0)
    assert select(alone) == {"amodal": {"pool": 3, "kept": 3}}
    assert kept(alone, "amodal") == {"s00", "s01", "s02"}
    assert not alone.samples("rl_vanilla").exists()


def test_an_empty_selection_is_filled_if_the_profile_says_so(run):
    answer(run, "learner", set())
    answer(run, "reference", set())
    assert select(run)["vanilla"]["kept"] == 0
    filling = Run(replace(run.profile, selection=replace(run.profile.selection, fill_to=4)), 0)
    assert select(filling)["vanilla"] | {"kept": 4, "filled": 4} == select(filling)["vanilla"]


def test_without_easy_ones(run):
    answer(run, "learner", {0, 1})
    answer(run, "reference", {5})
    bare = Run(replace(run.profile, selection=replace(run.profile.selection, num_easy="none")), 0)
    select(bare)
    assert kept(bare) == {"s05"}


def test_answers_to_different_samples_are_refused(run):
    answer(run, "learner", {0})
    answer(run, "reference", {0}, numbers=range(2, 10))
    with pytest.raises(ValueError, match="answered different samples"):
        select(run)


def asked(run, monkeypatch) -> list[str]:
    """Samples that the reference is asked about."""
    run = Run(replace(run.profile, selection=replace(run.profile.selection, reference="misses")), 0)
    monkeypatch.setattr(selection, "make_engine", lambda *args: FakeEngine())
    path = answer_pool(run, "reference")
    return [json.loads(line)["sample_id"] for line in path.read_text().splitlines()]


def test_the_pool_is_asked_with_the_prompt_of_grpo_by_an_engine_that_is_closed(run, monkeypatch):
    """What is learnable depends on the prompt. vLLM's engine keeps its GPU until it is closed."""
    profile = replace(run.profile, grpo=replace(run.profile.grpo, prompt="qwen-refcoco"))
    engine = FakeEngine()
    monkeypatch.setattr(selection, "make_engine", lambda *args: engine)
    answer_pool(Run(profile, 0), "reference")
    asked = engine.family.prompt("the left one", "vanilla", name="qwen-refcoco")
    assert engine.prompts == [asked] * 10 and engine.closed


def test_the_reference_answers_the_learners_misses_alone(run, monkeypatch):
    answer(run, "learner", {0, 1, 2, 3})
    assert asked(run, monkeypatch) == [f"s{number:02}" for number in range(4, 10)]


def test_the_reference_is_refused_before_the_learner_is_done(run, monkeypatch):
    answer(run, "learner", {0, 1}, numbers=range(5))
    with pytest.raises(InputError, match="--role learner"):
        asked(run, monkeypatch)


def test_answers_to_the_misses_select_the_same_as_answers_to_all(run):
    """And what they cannot tell is None, not zero."""
    answer(run, "learner", {0, 1, 2, 3})
    answer(run, "reference", {0, 5, 6})
    whole, chosen = select(run)["vanilla"], kept(run)
    answer(run, "reference", {5, 6}, numbers=range(4, 10))
    assert select(run)["vanilla"] == whole | {"both": None, "learner_only": None}
    assert kept(run) == chosen


def test_an_error_of_the_learners_engine_is_not_a_miss(run):
    answer(run, "learner", {0, 1})
    path = pool_answers(run, "learner")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5] |= {"status": "error", "error": "timeout", "raw_answer": ""}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer(run, "reference", {5, 6})
    assert select(run)["vanilla"]["learnable"] == 1 and "s05" not in kept(run)


def test_random_prompts_have_the_same_number_and_follow_the_seed(run):
    """The comparison with selected prompts is fair only where the numbers are equal."""
    drawn = []
    for seed in (0, 0, 1, 2):
        other = Run(run.profile, seed)
        write_samples(other.samples("rl_vanilla"), [sample(number) for number in range(5)])
        assert select_at_random(other) == 5
        drawn.append(list(read_samples(other.samples(AT_RANDOM))["sample_id"]))
    assert drawn[0] == drawn[1] and len({tuple(ids) for ids in drawn}) > 1
    assert all(len(set(ids)) == 5 and set(ids) <= {f"s{n:02}" for n in range(10)} for ids in drawn)
