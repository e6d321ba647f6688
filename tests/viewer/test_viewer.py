"""The viewer's Python side: joining, filtering, sorting, the still image, and broken rows."""

import base64
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import traitlets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from trace_world import (
    EGM,
    LARGE,
    SMALL,
    answer_row,
    draw_world,
    group_of,
    predictions_of,
    write_rows,
)

import egm_lib.viewer
from egm_lib.training.group_keeper import GroupKeeper
from egm_lib.training.groups import SAMPLE_FIELDS, read_groups
from egm_lib.viewer import TraceViewer
from egm_lib.viewer.comparison import compare
from egm_lib.viewer.drawing import draw_image
from egm_lib.viewer.page import enlarged, tint
from egm_lib.viewer.palette import FAILED, SOLVED, TINTS, style_of, styled


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return root, draw_world(root)


@pytest.fixture
def viewer(world):
    root, samples = world
    return TraceViewer(predictions_of(samples), root=root)


def image(viewer) -> np.ndarray:
    data, _ = viewer._repr_mimebundle_()
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    ).astype(int)


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((abs(pixels - wanted).sum(axis=2) < 12).sum() > 20)


def test_models_come_in_the_order_of_the_story_whatever_the_order_of_rows(world):
    root, samples = world
    assert TraceViewer(predictions_of(samples)[::-1], root=root).models == [SMALL, EGM, LARGE]


def test_filter_finds_what_b_solves_and_a_misses(viewer, world):
    _, samples = world
    viewer.filter = {"show": "B solves what A misses", "a": SMALL, "b": EGM}
    missed = [s["sample_id"] for s in samples if s["place"] != 0 or s["task"] == "amodal"]
    assert viewer.sample_ids == missed  # the small model always takes the first square
    assert viewer.count == len(missed) < viewer.total == len(samples)
    assert (
        viewer.sample["answers"][EGM]["success"] and not viewer.sample["answers"][SMALL]["success"]
    )


def test_each_show_partitions_as_its_words_say(viewer):
    def left(show):
        viewer.filter = {"show": show}
        return set(viewer.sample_ids)

    everything = left("all")
    assert left("A misses") | left("A solves") == everything and not left("A misses") & left(
        "A solves"
    )
    assert left("both miss") == left("A misses") - left("B solves what A misses")
    viewer.filter = {"show": "B gives no box", "b": LARGE}
    assert set(viewer.sample_ids) == everything


def test_search_split_and_ids_narrow_together(viewer, world):
    _, samples = world
    word = samples[0]["expression"].split()[0]
    viewer.filter = {"search": word.upper(), "split": "refcoco_val"}
    assert viewer.sample_ids == [
        s["sample_id"]
        for s in samples
        if word in s["expression"] and (s["dataset"], s["split"]) == ("refcoco", "val")
    ]
    viewer.filter = {"sample_ids": ["s4", "s1"]}
    assert viewer.sample_ids == ["s1", "s4"]


def test_sorting_by_gain_puts_what_egm_won_first(viewer):
    viewer.sort = "gain A to B, high first"
    gains = []
    for place in range(viewer.count):
        viewer.index = place
        answers = viewer.sample["answers"]
        gains.append(answers[EGM]["iou"] - answers[SMALL]["iou"])
    assert gains == sorted(gains, reverse=True) and gains[0] > gains[-1]


def test_a_filter_keeps_the_sample_one_looks_at_where_it_can(viewer):
    viewer.index = 4
    viewer.sort = "IoU of A, high first"
    assert viewer.sample["sample_id"] == "s4" and viewer.sample_ids[viewer.index] == "s4"


def test_index_stops_at_the_ends(viewer):
    viewer.index = 99
    assert viewer.index == viewer.count - 1
    viewer.index = -3
    assert viewer.index == 0


@pytest.mark.parametrize("bad", [{"shwo": "all"}, {"show": "everything"}, {"a": "gpt"}])
def test_an_unknown_filter_is_refused_and_the_view_stays(viewer, bad):
    before = viewer.sample_ids
    with pytest.raises(traitlets.TraitError, match="filter"):
        viewer.filter = bad
    assert viewer.sample_ids == before


def test_a_filter_that_leaves_nothing_says_so_and_can_be_undone(viewer):
    viewer.filter = {"search": "no such words"}
    assert (viewer.count, viewer.view, viewer.sample) == (0, {}, {})
    assert image(viewer).shape[2] == 3
    viewer.filter = {}
    assert viewer.count == viewer.total and viewer.view["sample_id"] == "s0"


def test_the_page_gets_the_boxes_of_the_row_in_pixels(viewer, world):
    _, samples = world
    for place, sample in enumerate(samples):
        viewer.index = place
        view = viewer.view
        assert (view["gt_box"], view["width"]) == (sample["gt_box"], sample["width"])
        assert [m["box"] for m in view["models"]] == [
            sample["boxes_all"][0],
            sample["gt_box"],
            None,
        ]
        assert view["image"].startswith("data:image/png;base64,")
    json.dumps(viewer.view, allow_nan=False)


def test_the_mime_bundle_carries_a_png_with_every_shown_models_colour(viewer):
    viewer.filter = {"show": "B solves what A misses"}
    data, _ = viewer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    both = image(viewer)
    assert has_colour(both, "#D55E00") and has_colour(both, "#0072B2")
    # Words of EGM's trace
    assert has_colour(both, TINTS["place"]) and has_colour(both, TINTS["alike"])
    viewer.hidden = [SMALL, LARGE]
    assert not has_colour(image(viewer), "#D55E00")


@pytest.mark.parametrize("suffix, head", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_exports_what_is_seen(viewer, tmp_path, suffix, head):
    assert viewer.export(tmp_path / f"x.{suffix}").read_bytes().startswith(head)
    with pytest.raises(ValueError, match="cannot write"):
        viewer.export(tmp_path / "x.bmp")
    assert [file.name for file in tmp_path.iterdir()] == [f"x.{suffix}"]


def test_the_page_can_ask_for_a_file(viewer, monkeypatch):
    sent = []
    monkeypatch.setattr(
        viewer, "send", lambda message, buffers=None: sent.append((message, buffers))
    )
    viewer._answer_page(viewer, {"export": "svg"}, [])
    viewer._answer_page(viewer, {"export": "../etc"}, [])
    [(message, [content])] = sent
    assert message["name"] == "s0.svg" and b"<svg" in content


def test_an_error_in_one_row_shows_in_that_row(world):
    root, samples = world
    rows = [answer_row(sample, EGM, sample["gt_box"], "the left one") for sample in samples]
    rows[0] |= {"status": "error", "error": "engine said no"}
    rows[1] |= {"gt_box": [1, 2, 3]}
    rows[2] |= {"image": "images/none.png"}
    rows[3] |= {"box": [5, float("nan"), 7, 8]}
    viewer = TraceViewer(rows, root=root)
    messages = []
    for place in range(4):
        viewer.index = place
        [model] = viewer.view["models"]
        messages.append(model["error"] or viewer.view["error"])
        image(viewer)  # the still image, too
    for text, words in zip(
        messages,
        ("engine said no", "gt_box must be four", "none.png", "must be finite"),
        strict=True,
    ):
        assert words in text
    viewer.index = 4
    assert viewer.view["error"] is None and viewer.view["models"][0]["success"]


@pytest.mark.parametrize(
    "field", ["raw_answer", "reasoning", "boxes", "width", "image", "prompt_kind", "answer_tokens"]
)
def test_a_field_of_a_wrong_kind_shows_in_its_row_alone(world, field):
    root, samples = world
    rows = [answer_row(sample, EGM, sample["gt_box"], "the left one") for sample in samples]
    rows[0][field] = {"not": "this"}
    rows[2]["latency_ms"] = float("nan")
    viewer = TraceViewer(rows, root=root)
    assert f"{field} must be" in viewer.view["models"][0]["error"]
    viewer.figure()
    viewer.index = 1
    assert viewer.view["error"] is None and viewer.view["models"][0]["success"]
    viewer.filter = {"show": "a row in error"}
    assert viewer.sample_ids == [samples[0]["sample_id"], samples[2]["sample_id"]]


def test_half_a_surrogate_pair_reaches_the_page_as_text(world):
    """A page is sent as UTF-8."""
    root, samples = world
    row = answer_row(samples[0], EGM, samples[0]["gt_box"], "half \ud83d of it")
    group = group_of(samples[0])
    group["completions"][0] = "\ud83d"
    viewer = TraceViewer([row | {"expression": "\ud83d"}], root=root, groups=[group])
    text = json.dumps(viewer.view, ensure_ascii=False, allow_nan=False)
    assert "half \ufffd of it" in text and text.encode()


def test_an_id_of_zero_is_an_id(world):
    root, samples = world
    rows = [answer_row(samples[0] | {"sample_id": 0}, EGM, samples[0]["gt_box"], "the left one")]
    viewer = TraceViewer(rows, root=root, groups=[group_of(samples[0] | {"sample_id": 0})])
    assert viewer.total == 1 and viewer.sample["sample_id"] == 0
    assert viewer.view["models"][0]["success"] and viewer.view["group"]
    image(viewer)
    sent = []
    viewer.send = lambda message, buffers: sent.append(message)
    viewer._answer_page(None, {"export": "png"}, [])
    assert sent[0]["name"] == "0.png"


def test_a_row_without_an_id_is_shown_with_its_error(world):
    root, samples = world
    row = answer_row(samples[0], EGM, samples[0]["gt_box"], "the left one")
    viewer = TraceViewer([row | {"sample_id": None}, row], root=root)
    assert viewer.sample_ids == ["(row 1)", "s0"]
    assert "no sample_id" in viewer.view["models"][0]["error"]


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [5, 5, 5, 90]])
def test_an_empty_box_is_a_miss_with_a_sentence(world, box):
    root, samples = world
    viewer = TraceViewer([answer_row(samples[0], EGM, box, "the left one")], root=root)
    [model] = viewer.view["models"]
    assert model["error"] is None and not model["success"] and "empty" in model["verdict"]
    image(viewer)


@pytest.mark.parametrize(
    "box", [[0, 0, 1e300, 1e300], [-1e9, -1e9, 1e9, 1e9], [900, 900, 950, 950]]
)
def test_a_box_far_outside_the_image_is_shown(world, box):
    root, samples = world
    viewer = TraceViewer([answer_row(samples[0], EGM, box, "the left one")], root=root)
    [model] = viewer.view["models"]
    assert model["error"] is None and not model["success"] and model["box"] is not None
    image(viewer)


def test_a_torn_file_shows_its_whole_rows(world, tmp_path):
    root, samples = world
    path = write_rows(tmp_path / "rows.jsonl", predictions_of(samples))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 40] + "é".encode()[:1])
    viewer = TraceViewer(path, root=root)
    assert viewer.total == len(samples) and LARGE not in viewer._comparisons[-1].answers


def test_a_null_completion_is_one_without_a_box(world):
    root, samples = world
    group = group_of(samples[0])
    group["completions"][3] = None
    shown = TraceViewer(groups=[group], root=root).view["group"]["completions"]
    assert len(shown) == 16 and shown[3]["box"] is None and shown[0]["success"]


def test_steps_of_a_trace_reach_the_page(world):
    root, samples = world
    sample = next(sample for sample in samples if sample["place"] > 0)
    rows = predictions_of([sample])
    viewer = TraceViewer(rows, root=root)
    base, egm, _ = viewer.view["models"]
    assert base["steps"] == [] and len(egm["steps"]) == sample["place"] + 1
    for number, (step, box) in enumerate(zip(egm["steps"], sample["boxes_all"], strict=False), 1):
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        assert step["point"] == pytest.approx(centre, abs=0.1) and step["fault"] == ""
        [words] = [text for text, kind in egm["reasoning"] if kind == f"step {number}"]
        assert words.startswith("at ")
    assert "".join(text for text, _ in egm["reasoning"]) == rows[1]["reasoning"]
    first_alone = {sample["sample_id"]: sample["boxes_all"][:1]}
    known = TraceViewer(rows, root=root, objects=lambda row: first_alone[row["sample_id"]])
    egm = known.view["models"][1]
    assert [bool(step["fault"]) for step in egm["steps"]] == [False] + [True] * sample["place"]


def test_strokes_lie_outside_their_boxes():
    """A box hides nothing of what it bounds: inside it the image stays as it was."""
    grey, size_px = Image.new("RGB", (100, 100), (128, 128, 128)), 400
    sample = {"image": grey, "width": 100, "height": 100, "gt_box": [30, 30, 70, 70]}
    with styled():
        figure = Figure(figsize=(4, 4), dpi=100)
        ax = figure.add_axes((0, 0, 1, 1))
        draw_image(ax, sample, [((30, 30, 70, 70), style_of(EGM))], ".")
        figure.canvas = FigureCanvasAgg(figure)
        figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    scale = size_px / 100
    inside = slice(int(30 * scale) + 1, int(70 * scale) - 1)
    assert (abs(pixels[inside, inside] - 128) < 6).all()
    assert has_colour(pixels, style_of(EGM).colour)


def test_a_small_image_is_enlarged_to_whole_squares():
    small = Image.effect_noise((64, 48), 90).convert("RGB")
    large = enlarged(small)
    assert large.width % 64 == 0 and large.width >= 512
    assert (
        np.asarray(large.resize(small.size, Image.Resampling.NEAREST)) == np.asarray(small)
    ).all()
    colours = [np.unique(np.asarray(each).reshape(-1, 3), axis=0) for each in (small, large)]
    assert np.array_equal(*colours)  # no colour is made up
    photo = Image.new("RGB", (640, 480))
    assert enlarged(photo) is photo


@pytest.mark.parametrize(
    "broken, words",
    [
        ({"completions": None}, "the group cannot be shown"),  # null in the file
        ({"rewards": [1.0]}, "the group cannot be shown"),  # fewer rewards than completions
        ({"gt_box": None}, "the group cannot be shown"),
        ({"rewards": [1.0] * 15 + [float("nan")]}, "must be finite"),  # JSON has no nan
        ({"rewards": [1.0] * 16, "advantages": [float("inf")] * 16}, "must be finite"),
    ],
)
def test_an_error_in_one_group_shows_at_its_sample(world, broken, words):
    root, samples = world
    viewer = TraceViewer(groups=[group_of(samples[0]) | broken, group_of(samples[1])], root=root)
    assert words in viewer.view["error"] and viewer.view["group"] is None
    viewer.index = 1
    assert viewer.view["error"] is None and len(viewer.view["group"]["completions"]) == 16


def test_reads_folders_and_frames_and_refuses_two_answers_to_one_sample(world, tmp_path):
    import pandas as pd

    root, samples = world
    rows = predictions_of(samples)
    for model in (SMALL, EGM):
        write_rows(
            tmp_path / "predictions" / model / "all.jsonl",
            [row for row in rows if row["model"] == model],
        )
    assert TraceViewer(tmp_path / "predictions", root=root).total == len(samples)
    assert TraceViewer(pd.DataFrame(rows), root=root).models == [SMALL, EGM, LARGE]
    with pytest.raises(ValueError, match="answers 's0' twice"):
        compare([rows[0], rows[0]])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TraceViewer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no predictions of gpt"):
        TraceViewer(rows, models=["gpt"], root=root)


def test_several_seeds_are_several_entries(world):
    root, samples = world
    rows = predictions_of(samples, seed=0) + predictions_of(samples, seed=1)
    assert TraceViewer(rows, root=root).total == 2 * len(samples)


def test_a_group_shows_rewards_and_standardised_advantages(world):
    root, samples = world
    viewer = TraceViewer(groups=[group_of(samples[0])], root=root)
    completions = viewer.view["group"]["completions"]
    rewards = np.array([c["reward"] for c in completions])
    advantages = np.array([c["advantage"] for c in completions])
    assert len(completions) == 16 and sum(c["success"] for c in completions) == 8
    # Eq. 7
    assert np.allclose(
        advantages, (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4), atol=1e-4
    )
    given = group_of(samples[0]) | {"rewards": [1.0] * 16, "advantages": [0.0] * 16}
    shown = TraceViewer(groups=[given], root=root).view["group"]["completions"]
    assert {(c["reward"], c["advantage"]) for c in shown} == {(1.0, 0.0)}


def test_groups_that_training_kept_are_shown(world, tmp_path):
    """What GRPO's keeper writes: a group without predictions holds its sample and its numbers."""
    root, samples = world
    keeper = GroupKeeper(tmp_path / "groups" / "vanilla.jsonl", "<think>")
    sample = {name: samples[0][name] for name in SAMPLE_FIELDS}
    texts = group_of(samples[0], count=4)["completions"]
    keeper.keep(7, [sample] * 4, texts, torch.tensor([1.0, 0.0, 1.0, 0.0]), 4)
    keeper.on_save(None, SimpleNamespace(is_world_process_zero=True), None)
    viewer = TraceViewer(groups=read_groups(keeper.path), root=root)
    assert viewer.view["expression"] == sample["expression"] and viewer.view["group"]["step"] == 7
    shown = viewer.view["group"]["completions"]
    assert [answer["reward"] for answer in shown] == [1.0, 0.0, 1.0, 0.0]
    assert [answer["success"] for answer in shown] == [True, False, True, False]
    assert (
        shown[0]["advantage"] == pytest.approx(-shown[1]["advantage"]) and shown[0]["advantage"] > 0
    )
    assert viewer.view["image"] and viewer.view["error"] is None
    still = image(viewer)
    assert has_colour(still, FAILED) and has_colour(still, SOLVED)  # where widgets do not run, too


def test_tint_marks_places_and_look_alikes_and_loses_no_letter():
    text = "There are two dogs; the second one from the left is next to the door, not the other."
    pieces = tint(text)
    assert "".join(piece for piece, _ in pieces) == text
    assert {piece for piece, kind in pieces if kind == "place"} == {"from the left", "next to"}
    assert {piece for piece, kind in pieces if kind == "alike"} == {"two", "second", "not", "other"}
    assert tint("bright leftover") == [("bright leftover", "")]  # right, left inside words


def test_hostile_text_stays_text(world):
    """The page makes nothing but text nodes: markup reaches it unchanged, never by innerHTML."""
    root, samples = world
    attack = "<img src=x onerror=alert(1)>"
    viewer = TraceViewer(
        [answer_row(samples[0] | {"expression": attack}, EGM, None, attack)], root=root
    )
    assert viewer.view["expression"] == attack
    scripts = list(Path(egm_lib.viewer.__file__).parent.glob("*.js"))
    assert len(scripts) > 1
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text


def test_ten_thousand_samples_open_fast_and_stay_light(world):
    root, samples = world
    rows = []
    for number in range(10_000):
        sample = samples[number % len(samples)] | {"sample_id": f"n{number}"}
        rows.append(answer_row(sample, SMALL, sample["boxes_all"][0], None))
        rows.append(answer_row(sample, EGM, sample["gt_box"], "so"))
    start = time.process_time()  # the time of this process, whatever else runs here
    viewer = TraceViewer(rows, root=root)
    assert time.process_time() - start < 2
    assert len(json.dumps(viewer.view)) < 100_000 and len(json.dumps(viewer.choices)) < 10_000
    start = time.process_time()
    viewer.filter = {"show": "B solves what A misses"}
    assert time.process_time() - start < 1
