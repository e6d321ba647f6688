"""Files of the miniature world: the format of real data, disjoint splits, known planted faults."""

import json

import numpy as np
import pytest

from egm_lib.boxes import BoxFrame, iou
from egm_lib.data import open_image, read_samples, resolve_image
from egm_lib.mini import world
from egm_lib.profile import Data, load_profile
from egm_lib.viewer.steps import places

WANTED = {name: 40 if name.startswith("train") else 12 for name in world.recipes()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "mini"
    world.write_world(out, WANTED)
    return out


def rows_of(root, name):
    return list(read_samples(root / name))


def test_every_file_has_its_samples_and_every_sample_its_image(root):
    for name, count in WANTED.items():
        rows = rows_of(root, name)
        assert len(rows) == count
        for row in rows[:4]:
            assert open_image(resolve_image(row, root)).size == (row["width"], row["height"])


def test_no_image_is_shared_between_files(root):
    seen: dict[str, str] = {}
    for name in WANTED:
        for image in {row["image"] for row in rows_of(root, name)}:
            digest = np.asarray(open_image(root / image)).tobytes()
            assert seen.setdefault(digest, name) == name


def test_refcoco_plus_has_no_location_words(root):
    for split in ("val", "testA", "testB"):
        for row in rows_of(root, f"eval/refcoco+_{split}.jsonl"):
            assert not {"left", "right", "top", "bottom", "above", "below"} & set(
                row["expression"].split()
            )


def test_amodal_targets_are_partly_hidden(root):
    for row in rows_of(root, "eval/coco_amodal_val.jsonl"):
        assert iou(row["modal_box"], row["gt_box"]) <= 0.85


def test_the_teacher_knows_every_sample_and_its_planted_fault(root):
    truths = {row["sample_id"]: row for row in map(json.loads, (root / "teacher.jsonl").open())}
    for name in WANTED:
        for row in rows_of(root, name):
            truth = truths[row["sample_id"]]
            assert truth["gt_box"] == row["gt_box"]
            if truth["planted_cause"] is None and row["task"] == "vanilla":
                assert all(iou(row["gt_box"], other) < 0.5 for other in truth["lookalike_boxes_px"])


def test_a_world_is_the_same_twice_and_a_finished_one_is_left_alone(root, tmp_path):
    again = tmp_path / "again"
    world.write_world(again, WANTED)
    assert (again / "train.jsonl").read_bytes() == (root / "train.jsonl").read_bytes()
    before = (again / "train.jsonl").stat().st_mtime_ns
    world.write_world(again, WANTED)
    assert (again / "train.jsonl").stat().st_mtime_ns == before


def test_other_test_scenes_change_the_test_splits_alone(root, tmp_path):
    """A registered experiment answers scenes that nobody has seen, from the same training data."""
    small = {name: 6 for name in WANTED}
    first, other = tmp_path / "first", tmp_path / "other"
    world.write_world(first, small)
    world.write_world(other, small, test_scenes=1)
    for name in small:
        same = (first / name).read_bytes() == (other / name).read_bytes()
        assert same != name.startswith("eval/"), name
    world.write_world(other, small)  # the scenes are part of what makes a world another
    assert (first / "eval/refcoco_val.jsonl").read_bytes() == (
        other / "eval/refcoco_val.jsonl"
    ).read_bytes()


def test_objects_are_those_of_the_stored_scene(root):
    """Every place that the teacher names lies on one of them: it reasons about the same scene."""
    data = load_profile("mini").data
    truths = {row["sample_id"]: row for row in map(json.loads, (root / "teacher.jsonl").open())}
    named = 0
    for row in (row for name in WANTED for row in rows_of(root, name)):
        objects = world.objects_in(row, data)
        assert any(iou(row["gt_box"], box) > 0.2 for box in objects)
        truth, visible = truths[row["sample_id"]], row["modal_box"] and tuple(row["modal_box"])
        for trace in filter(None, (truth["reasoning"], truth["amodal_reasoning"])):
            frame, image_wh = BoxFrame.NORM_1000, (row["width"], row["height"])
            known = {"frame": frame, "image_wh": image_wh, "visible": visible}
            steps = places(trace, **known, objects=objects)
            assert [step.fault for step in steps] == [""] * len(steps), trace
            named += len(steps)
    assert named > 500


def test_objects_of_another_image_are_not_made_up(root):
    data = load_profile("mini").data
    row = rows_of(root, "eval/refcoco_val.jsonl")[0]
    assert world.objects_in(row, Data(source="refcoco", root="data/raw/refcoco")) is None
    others = (
        {"flipped": True},
        {"split": "unknown"},
        {"image_id": "COCO_train2014_000000000072"},  # the box is none of that scene's
        {"image_id": None},
        {"gt_box": [1.0, 2.0, 3.0, 4.0]},
        {"gt_box": None},
    )
    for change in others:
        assert world.objects_in(row | change, data) is None, change
