"""CKA and probe on constructed cases; each feature vector is that of the right cell."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_qwen import tiny_qwen

from egm_lib.data import write_samples
from egm_lib.evaluation import vision_features
from egm_lib.evaluation.vision_features import (
    box_probe,
    cell_features,
    compare_models,
    linear_cka,
)

RNG = np.random.default_rng(0)


def test_cka_is_one_for_a_rotated_scaled_shifted_copy_and_near_zero_for_noise():
    x = RNG.normal(size=(2000, 12))
    rotation = np.linalg.qr(RNG.normal(size=(12, 12)))[0]
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, RNG.normal(size=(2000, 20))) < 0.02
    half = np.hstack([x, RNG.normal(size=(2000, 12))])  # half of it shared: 12 / sqrt(12 * 24)
    assert linear_cka(x, half) == pytest.approx(0.5**0.5, abs=0.02)
    assert linear_cka(x, half) == pytest.approx(linear_cka(half, x), abs=1e-12)


def test_cka_refuses_features_for_which_it_is_undefined():
    with pytest.raises(ValueError, match="same cells"):
        linear_cka(np.ones((3, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="no similarity"):
        linear_cka(np.ones((3, 2)), RNG.normal(size=(3, 2)))


def test_a_probe_reads_boxes_only_if_they_are_in_the_features():
    corners = RNG.uniform(0, 0.5, size=(400, 2))
    boxes = np.hstack([corners, corners + RNG.uniform(0.2, 0.4, size=(400, 2))])
    held_out = np.arange(400) % 2 == 1
    mixed = np.hstack([boxes @ RNG.normal(size=(4, 8)), 0.1 * RNG.normal(size=(400, 8))])
    read = box_probe(mixed, boxes, held_out)
    assert read.shape == (200,) and read.mean() > 0.9
    guessed = box_probe(RNG.normal(size=(400, 16)), boxes, held_out)
    average = box_probe(np.zeros((400, 1)), boxes, held_out)  # nothing to read: the mean box
    assert guessed.mean() < average.mean() + 0.03 and average.mean() < 0.5
    with pytest.raises(ValueError, match="held out"):
        box_probe(mixed, boxes, np.zeros(400))


def test_a_cell_s_features_are_found_where_the_box_is():
    """A tower whose features name their cell: they are the number of the cell."""
    model, processor = tiny_qwen()
    visual, counts = model.model.visual, []

    def number_cells(pixels, grid_thw, forward=visual.forward):
        output = forward(pixels, grid_thw=grid_thw)
        counts.append(grid_thw.prod(dim=-1) // visual.spatial_merge_size**2)
        for seen, count in zip(
            output.pooler_output.split(counts[-1].tolist()), counts[-1].tolist(), strict=True
        ):
            seen[:] = seen.new_tensor(range(count))[:, None]
        return output

    visual.forward = number_cells
    # Cells of 16 px: 4 x 2 and 2 x 4
    images = [Image.new("RGB", (64, 32)), Image.new("RGB", (32, 64))]
    got = cell_features(
        model, processor, images, [[(50, 20, 60, 30), (2, 2, 4, 4)], [(2, 34, 10, 44)]]
    )
    assert got.shape == (3, 64) and got[:, 0].tolist() == [7, 0, 4]
    outside = cell_features(model, processor, images[:1], [[(-30, 20, 10, 40)]])
    assert outside[0, 0] == 4  # an amodal box, whose centre has left the image


def test_a_run_of_the_amodal_task_alone_is_compared_on_its_own_samples(tmp_path, monkeypatch):
    """`prepare --task amodal` writes no vanilla samples. InternVL-3 has tiles instead of cells."""
    for number in range(4):
        pixels = RNG.integers(0, 255, size=(32, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    common = {"dataset": "coco_amodal", "split": "train", "task": "amodal", "flipped": False}
    common |= {"width": 64, "height": 32, "gt_box": [40.0, 10.0, 70.0, 30.0]}
    rows = [
        common
        | {"sample_id": f"{number}-{words}", "expression": words}
        | {"image_id": f"{number}", "image": f"{number}.png"}
        for words in ("cup", "mug")
        for number in range(4)
    ]
    write_samples(tmp_path / "train_amodal.jsonl", rows)
    families = {"small-base": "qwen3-vl", "large-base": "internvl-3"}
    checkpoints = {
        name: SimpleNamespace(location=name, dtype="float32", family=family)
        for name, family in families.items()
    }
    model, processor = tiny_qwen()
    read = []
    model.model.visual.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    monkeypatch.setattr(vision_features, "model_of", lambda run, name, task: checkpoints[name])
    monkeypatch.setattr(vision_features, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(vision_features, "load_processor", lambda *_: processor)
    profile = SimpleNamespace(tasks=("amodal",), data=SimpleNamespace(path=tmp_path))
    table = compare_models(SimpleNamespace(profile=profile), list(families))
    assert table.loc["small-base", "CKA with small-base"] == pytest.approx(1)
    assert table.loc["small-base", "cells"] == 8 and table.loc["large-base"].isna().all()
    assert sum(read) == 4  # each image once, for both of its expressions
