"""The playground: asking, going on from an edited reasoning, moving objects, opening files."""

import base64
import io
import math
import threading
import time

import numpy as np
import pytest
from PIL import Image

from egm_lib.data.images import ImageError
from egm_lib.errors import InputError
from egm_lib.files import project_root
from egm_lib.inference.engine import Answer
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.mini.scenes import Scene, Thing, with_visibility
from egm_lib.profile import Sampling, load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.run import Run
from egm_lib.viewer import Playground
from egm_lib.viewer.steps import NO_OBJECT, places

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=96, repetition_penalty=1.0)
SCENE = with_visibility(
    Scene(
        (
            Thing("red", "circle", (8.0, 8.0, 32.0, 32.0)),
            Thing("red", "circle", (80.0, 60.0, 110.0, 90.0)),
        ),
        ground_seed=1,
    )
)
SAMPLE = {
    "sample_id": "a",
    "expression": "leftmost red circle",
    "gt_box": [8.0, 8.0, 32.0, 32.0],
    "modal_box": None,
    "width": 128,
    "height": 128,
    "scene": SCENE,
    "image": SCENE.image(),
}
BOX = '[{"bbox_2d": [62, 62, 250, 250]}]'  # SAMPLE's gt_box


class Speaker:
    """Says one word after another; goes on from what was begun. gate: waits before the last."""

    family, revision, batch_size, seed = FAMILIES["qwen3-vl"], None, 1, 0

    def __init__(self, reasoning="it is first at 160 160.", answer=BOX, streams=True, gate=None):
        self.reasoning, self.said, self.streams = reasoning, answer, streams
        self.gate, self.requests, self.closed = gate, [], False

    def answer(self, requests, sampling, *, reasoning=True):
        for request in requests:
            self.requests.append(request)
            begun = request.begun or (self.reasoning if reasoning else "")
            words = [f"<think>\n{begun}", "\n</think>\n\n", self.said]
            for number in range(1, len(words) + 1):
                if self.streams:
                    request.on_text("".join(words[:number]))
                if self.gate is not None and number == 1:
                    self.gate.wait(10)
            yield Answer("".join(words), 9, 5, 4, "stop", 20.0, 8.0)

    def close(self):
        self.closed = True


def made(engines=None, samples=(SAMPLE,), **options) -> Playground:
    options.setdefault("arrangement", lambda sample: sample.get("scene"))
    return Playground(engines or {"small-egm": Speaker()}, GREEDY, samples=samples, **options)


def still(playground) -> np.ndarray:
    data, _ = playground._repr_mimebundle_()
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    return np.asarray(image.convert("RGB"))


def told(playground, **message) -> None:
    """A message of the page, and the work that it starts, done."""
    buffers = message.pop("buffers", [])
    playground._on_page(None, message, buffers)
    deadline = time.monotonic() + 10
    while playground.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not playground.busy


def test_an_answer_is_judged_where_the_truth_is_known():
    playground = made()
    [answer] = playground.ask().values()
    assert answer.success and answer.iou > 0.9
    [view] = playground.answers
    assert view["verdict"].startswith("hit") and len(view["steps"]) == 1
    [answer] = playground.ask("another red circle").values()
    assert answer.success is None and math.isnan(answer.iou) and answer.box is not None
    assert playground.answers[0]["verdict"] == "box from 8, 8 to 32, 32 px"
    assert playground.view["gt_box"] is None


def test_text_reaches_the_page_while_it_is_written():
    playground, seen = made(), []
    playground.observe(lambda change: seen.append(change["new"]), "answers")
    playground.ask()
    statuses = [views[0]["status"] for views in seen]
    assert statuses[0] == "waiting" and "writing" in statuses and statuses[-1] == "ok"
    partial = next(views[0] for views in seen if views[0]["status"] == "writing")
    assert "".join(text for text, _ in partial["reasoning"]) == "it is first at 160 160."
    assert partial["steps"] and not partial["answer"]  # steps are there before the box is


def test_an_engine_that_does_not_stream_says_so():
    playground = made({"small-egm": Speaker(streams=False)})
    playground.ask()
    assert playground.answers[0]["note"] == "this engine answers at once"
    assert playground.answers[0]["success"]


def test_it_goes_on_from_the_edited_reasoning_and_keeps_the_first_answer():
    engine = Speaker()
    playground = made({"small-egm": engine})
    with pytest.raises(InputError, match="ask a question first"):
        playground.go_on("small-egm", "first at 740 580.")
    playground.ask()
    answer = playground.go_on("small-egm", "first at 740 580.")
    assert engine.requests[-1].begun == "first at 740 580."
    assert list(playground.scored) == ["small-egm", "small-egm, edited"]
    assert answer.row["raw_answer"].startswith("<think>\nfirst at 740 580.")
    assert [view["label"] for view in playground.answers] == [
        "small + EGM",
        "small + EGM, edited",
    ]
    playground.go_on("small-egm, edited", "second at 740 580.")  # an edited one can be edited
    assert engine.requests[-1].begun == "second at 740 580."
    with pytest.raises(InputError, match="no reasoning to continue from"):
        playground.go_on("small-egm", " ")


def test_the_same_question_without_reasoning_stands_beside():
    playground = made()
    playground.ask()
    playground.ask(reasoning=False)
    assert list(playground.scored) == ["small-egm", "small-egm, no reasoning"]
    assert playground.scored["small-egm, no reasoning"].success
    playground.ask("another thing", reasoning=False)  # another question: a new sheet
    assert list(playground.scored) == ["small-egm, no reasoning"]


def test_a_dragged_object_changes_the_image_and_what_is_known():
    playground = made()
    before = playground.view
    told(playground, do="move", number=0, by_px=[30, 500])
    after = playground.view
    assert after["objects"][0]["box"] == [38, 104, 62, 128]  # stopped by the lower edge
    assert after["image"] != before["image"] and after["gt_box"] is None
    assert after["name"] == "sample 1, rearranged" and not playground.scored
    [answer] = playground.ask().values()
    assert answer.success is None
    [step] = playground.answers[0]["steps"]
    assert step["fault"] == NO_OBJECT  # the trace names the place where the circle was
    told(playground, do="move", number=9, by_px=[1, 1])
    assert "no object 9" in playground.problem


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "cup.jpg: not a readable image"),
        (b"<svg></svg>", "cup.jpg: not a readable image"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 40, "cup.jpg: not a readable image"),
    ],
    ids=["empty", "a drawing", "broken"],
)
def test_a_file_that_is_no_image_is_refused_in_a_sentence(content, problem):
    playground = made()
    told(playground, do="open", name="cup.jpg", buffers=[content])
    assert problem in playground.problem and "Traceback" not in playground.problem
    assert playground.view["name"] == "sample 1"  # the image before it stays
    with pytest.raises(ImageError):
        playground.show_file(content)
    with pytest.raises(FileNotFoundError, match="no image"):
        playground.show_file("nowhere.png")


def test_a_run_without_its_images_opens_and_says_so(tmp_path):
    absent = {**SAMPLE, "image": "images/1.png"}
    playground = made(samples=[absent], root=tmp_path)
    assert "1.png" in playground.problem and not playground.view
    assert playground._repr_mimebundle_()[0]["image/png"]
    playground.show_file(Image.new("RGB", (20, 20)))  # an image of one's own is still answered
    assert playground.ask("it") and not playground.problem


def test_a_file_of_ones_own_is_answered(tmp_path):
    Image.new("L", (200, 100), 128).save(tmp_path / "cup.png")
    playground = made(samples=())
    with pytest.raises(InputError, match="no image yet"):
        playground.ask("the cup")
    told(playground, do="open", name="cup.png", buffers=[(tmp_path / "cup.png").read_bytes()])
    assert (playground.view["width"], playground.view["height"]) == (200, 100)
    assert not playground.problem and not playground.view["objects"]
    [answer] = playground.ask("the cup").values()
    assert answer.box == pytest.approx((12.4, 6.2, 50, 25))  # relative to this image
    with pytest.raises(InputError, match="cannot be moved"):
        playground.move(0, (1, 1))


@pytest.mark.parametrize(
    "message, problem",
    [
        ({"expression": " ", "models": ["small-egm"]}, "type what to find"),
        ({"expression": "it", "models": []}, "choose a model"),
        ({"expression": "it", "models": ["gpt"]}, "no model 'gpt'"),
    ],
)
def test_a_question_that_cannot_be_asked_says_why(message, problem):
    playground = made()
    told(playground, do="ask", reasoning=True, **message)
    assert problem in playground.problem


def test_a_model_that_fails_marks_its_own_answer():
    def absent():
        raise FileNotFoundError("no checkpoint x; train it first")

    playground = made({"small-base": absent, "small-egm": Speaker()})
    answers = playground.ask()
    assert answers["small-base"].error == "no checkpoint x; train it first"
    assert answers["small-egm"].success


def test_an_answer_can_be_stopped_and_keeps_what_was_written():
    gate = threading.Event()
    playground = made({"small-egm": Speaker(gate=gate), "large-base": Speaker()})
    page = {"do": "ask", "expression": "it", "models": ["small-egm", "large-base"]}
    playground._on_page(None, page | {"reasoning": True}, [])
    with pytest.raises(InputError, match="still answering"):
        playground.ask("another")
    while playground.answers[0]["status"] != "writing":
        time.sleep(0.01)
    playground._on_page(None, {"do": "stop"}, [])
    gate.set()
    while playground.busy:
        time.sleep(0.01)
    assert [view["status"] for view in playground.answers] == ["stopped", "stopped"]
    assert playground.scored["small-egm"].row["raw_answer"] == "<think>\nit is first at 160 160."


def test_engines_are_made_when_asked_and_no_more_are_held_than_fit():
    engines = [Speaker(), Speaker()]
    playground = made({"a": lambda: engines[0], "b": lambda: engines[1]}, engines_held=1)
    playground.ask(models=["a"])
    assert not engines[0].closed
    playground.ask(models=["b"])
    assert engines[0].closed and not engines[1].closed


def test_a_still_image_stands_where_no_kernel_runs():
    playground = made()
    asked_nothing = still(playground)
    assert np.unique(asked_nothing.reshape(-1, 3), axis=0).shape[0] > 100  # the scene is there
    playground.ask()
    assert not np.array_equal(still(playground)[:300], asked_nothing[:300])
    assert made(samples=())._repr_mimebundle_()[0]["image/png"]  # without an image too


# --- the miniature itself


@pytest.fixture(scope="module")
def reference() -> TransformersEngine:
    path = project_root() / "data" / "mini" / "reference"
    return TransformersEngine(str(path), "qwen3-vl", batch_size=8)


@pytest.fixture(scope="module")
def scenes() -> list[dict]:
    from egm_lib.pipeline.playground import playground

    samples = playground(Run(load_profile("mini"), 0))._samples
    return [sample for sample in samples if sample["num_lookalikes"] > 1][:6]


def test_going_on_from_the_unedited_reasoning_gives_the_same_box(reference, scenes):
    """An invariance: the text given back is what the model itself had written."""
    playground = made({"reference": reference}, scenes)
    for number in range(len(scenes)):
        playground.show_sample(number)
        first = playground.ask()["reference"]
        again = playground.go_on("reference", first.row["raw_answer"].split("</think>")[0][8:])
        assert again.row["raw_answer"] == first.row["raw_answer"]
        assert again.box == first.box is not None


def test_an_edited_last_place_moves_the_box(reference, scenes):
    """Another step leads to another box: most answers follow to the object that was put in."""
    playground, follow, asked = made({"reference": reference}, scenes), 0, 0
    for number, sample in enumerate(scenes):
        playground.show_sample(number)
        first = playground.ask()["reference"]
        trace = first.row["raw_answer"].split("</think>")[0][8:].strip()
        last = places(trace, frame=reference.family.frame, image_wh=(128, 128))[-1]
        centres = {
            tuple(20 * round(side / 128 * 50) for side in thing.centre_px): thing.visible_box_px
            for thing in sample["scene"].things
        }
        (x, y), box = max(
            centres.items(),
            key=lambda each: math.dist(each[0], [v / 0.128 for v in last.point]),
        )
        moved = playground.go_on("reference", f"{trace[: last.start]}at {x} {y}{trace[last.end :]}")
        asked += 1
        x1, y1, x2, y2 = moved.box
        follow += box[0] < (x1 + x2) / 2 < box[2] and box[1] < (y1 + y2) / 2 < box[3]
    assert follow / asked > 0.6, (follow, asked)
