"""What a service sees and is told, and how its answer is read."""

import base64
import dataclasses
import io

import pytest
from curation_world import make_root, teacher
from PIL import Image

from egm_lib.curation import templates
from egm_lib.curation.marks import Mark, marked_jpeg
from egm_lib.curation.request_plan import Plan
from egm_lib.curation.tasks import TASKS, messages


def test_the_image_is_marked_in_green_and_the_rest_is_left_alone(tmp_path):
    sample = make_root(tmp_path, 1)[0]
    content = messages(TASKS["trace"], sample, tmp_path / sample["image"])[0]["content"]
    data = base64.b64decode(content[0]["image_url"]["url"].split(",")[1])
    image = Image.open(io.BytesIO(data))
    assert image.size == (128, 96)
    red, green, blue = image.getpixel((21, 40))  # on the left edge of the box, 3 px wide here
    assert green > 100 and red < 60 and blue < 60
    assert abs(image.getpixel((40, 40))[1] - 90) < 12  # inside it
    # The label, white above the box
    assert image.crop((20, 2, 90, 19)).convert("L").getextrema()[1] > 150
    assert "[156, 208, 468, 624]" in content[1]["text"]  # 0..999


def test_the_key_follows_everything_that_is_sent(tmp_path, monkeypatch):
    sample = make_root(tmp_path, 1)[0]

    def key(task="trace", sample=sample, **more):
        return Plan(TASKS[task], [], teacher(**more), tmp_path).request(sample).key

    first = key()
    # How fast we ask is no part of the question
    assert key() == first and key(concurrency=3) == first
    others = [key("amodal-trace"), key(model="other"), key(temperature=0.1), key(max_tokens=9)]
    others += [
        key(sample=sample | change)
        for change in ({"expression": "x"}, {"gt_box": [1, 1, 9, 9]}, {"sample_id": "t"})
    ]
    Image.new("RGB", (128, 96), "white").save(tmp_path / sample["image"])
    others.append(key())  # the image's content
    changed = dataclasses.replace(TASKS["trace"], template=templates.TRACE + " Please.")
    monkeypatch.setitem(TASKS, "trace", changed)
    others.append(key())
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize("box", [(0, 5e12, 5, 6e12), (-9e15, -9e15, -8e15, -8e15)])
def test_a_predicted_box_far_outside_is_drawn_without_an_error(tmp_path, box):
    sample = make_root(tmp_path, 1)[0]
    image = Image.open(tmp_path / sample["image"])
    assert marked_jpeg(image, [Mark(box, "red", "predicted")], sample)


@pytest.mark.parametrize(
    "task, text, answer",
    [
        ("verify", " Yes.\n", "YES"),
        ("verify", "**NO**", "NO"),
        ("verify", "Yes and no", None),
        ("failure", "COMPLEX-PROMPT", "COMPLEX-PROMPT"),
        ("failure", "The cause is small object.", "SMALL-OBJECT"),
        ("failure", "GT-ERROR or OTHER", None),  # two are none
        ("failure", "another reason", None),
        ("failure", "COMPLEX-PROMPT. It took the other zebra.", "COMPLEX-PROMPT"),
        ("failure", "Category: Other", "OTHER"),
        ("amodal-expression", '"the woman in red".', "the woman in red"),
        ("amodal-expression", '"The Tiger behind the log."', "the tiger behind the log"),
        ("trace", "  left\n of it ", "left of it"),
    ],
)
def test_reading_an_answer(task, text, answer):
    assert TASKS[task].read(text) == answer


@pytest.mark.parametrize(
    "task, text, answer",
    [
        ("verify", "<think>Two cups. NO?</think>YES", "YES"),
        (
            "verify",
            "Two cups, so no. Or?\n</think>\n\nYes.",
            "YES",
        ),  # without the opener
        ("failure", "<think>GT-ERROR? No.</think>\nOTHER", "OTHER"),
        ("trace", "<think>Look.</think>The left\none.", "The left one."),
        ("amodal-expression", "<think>a cup</think>\nThe Left Cup.", "the left cup"),
        ("trace", "<think>cut off within", None),
        # Tags and end tokens would become a part of the SFT data
        ("trace", "<think>Look.</think>\n<answer>The left one.</answer>", "The left one."),
        ("amodal-expression", "<answer>a cup</answer>", "a cup"),
        ("verify", "<think>a</think><Answer>NO</Answer>", "NO"),
        ("verify", "YES<|im_end|>\n", "YES"),
        ("trace", "The left one.</s><|endoftext|>", "The left one."),
        ("trace", "<answer></answer>", None),
    ],
)
def test_what_follows_the_reasoning_is_the_answer(task, text, answer):
    assert TASKS[task].read(text) == answer


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [30, 10, 30, 50], [50, 10, 30, 40]])
def test_an_empty_predicted_box_is_stated_and_not_drawn(box):
    """It is a legal answer of a model, and a failure like any other."""
    sample = {"width": 128, "height": 96, "expression": "cup", "gt_box": [1, 1, 9, 9], "box": box}
    task = TASKS["failure"]
    assert [mark.label for mark in task.marks(sample)] == ["Ground Truth"]
    prompt = task.prompt(sample)
    assert f"Predicted box: {box}" in prompt and 'labelled "Prediction"' not in prompt
