"""Playground: ask models about an image, watch them answer, and change their reasoning.

    playground = Playground({"small-egm": engine}, sampling, samples=rows, root=root)
    playground.ask("the second red circle from the left")
    playground.go_on("small-egm", "circles from the left: first at 260 540.")
    playground                          # the page, where all of it is done with the mouse

Answers arrive token by token where the engine streams them (transformers, an endpoint). As the
viewer, the page is live while the kernel runs, and a still image stands in its place elsewhere.
"""

import io
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import anywidget
import traitlets
from PIL import Image

from egm_lib.boxes import Box
from egm_lib.data import open_image
from egm_lib.errors import EgmError, InputError
from egm_lib.inference.engine import Answer, Engine, Request, begun_reasoning
from egm_lib.parsing import parse_completion
from egm_lib.profile import Sampling
from egm_lib.prompts import DEFAULT_PROMPT
from egm_lib.viewer.comparison import Comparison, ScoredAnswer, judge
from egm_lib.viewer.drawing import comparison_figure
from egm_lib.viewer.page import answer_view, image_of, page_data_url, page_script, plain_box
from egm_lib.viewer.palette import style_of
from egm_lib.viewer.still import png_bundle

MAX_MODELS = 4  # more boxes on one image cannot be told apart
EDITED, NO_REASONING = ", edited", ", no reasoning"
REFRESH_S = 0.05  # the page is told of new text at most so often


class Arrangement(Protocol):
    """Objects on an image that can be moved, such as `egm_lib.mini.scenes.Scene`."""

    @property
    def objects(self) -> Sequence[tuple[str, Box]]:
        """Name and box (xyxy px) of every object, the topmost last."""

    def image(self) -> Image.Image: ...

    def moved(self, number: int, by_px: tuple[float, float]) -> "Arrangement":
        """The same with one object moved, as far as it stays on the image."""


class _Question(NamedTuple):
    """What one answer is asked for; name: of the answer, a model's with EDITED or NO_REASONING."""

    name: str
    model: str
    reasoning: bool = True
    begun: str = ""  # reasoning that the model continues


class _Stopped(Exception):
    """The user has stopped an answer."""


class Playground(anywidget.AnyWidget):
    """Images that one can choose, open or rearrange, and models that answer about them.

    engines: by model name, an engine, or a function that makes it when it is first asked.
    sampling: how they decode.
    samples: rows with image, expression, gt_box, width and height; image is a path relative to
    root, or a PIL image.
    arrangement: the scene of a sample, whose objects can then be dragged; None for an image that
    stays as it is.
    task, prompt: what the models are asked (`Family.prompt`).
    engines_held: so many engines are kept; one is closed before another is made. vLLM takes a
    GPU's memory, so that one is all that fits.

    Traits to set and to read: `expression`, `chosen` (the models to ask).
    `scored`: the answers so far by name, such as "small-egm" and "small-egm, edited".
    """

    _esm = page_script("playground")
    _css = Path(__file__).parent / "viewer.css"

    expression = traitlets.Unicode().tag(sync=True)
    chosen = traitlets.List(traitlets.Unicode()).tag(sync=True)
    busy = traitlets.Bool(False).tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)
    choices = traitlets.Dict({}).tag(sync=True)
    view = traitlets.Dict({}).tag(sync=True)
    answers = traitlets.List([]).tag(sync=True)

    def __init__(
        self,
        engines: Mapping[str, Engine | Callable[[], Engine]],
        sampling: Sampling,
        *,
        samples: Sequence[Mapping] = (),
        root: str | Path = ".",
        arrangement: Callable[[Mapping], Arrangement | None] = lambda sample: None,
        task: str = "vanilla",
        prompt: str = DEFAULT_PROMPT,
        engines_held: int = MAX_MODELS,
        **traits,
    ):
        if not engines:
            raise InputError("a playground needs at least one model that can answer")
        self._engines, self._made = dict(engines), {}
        self._sampling, self._task, self._prompt = sampling, task, prompt
        self._engines_held = engines_held
        self._samples, self._root, self._arrangement_of = list(samples), Path(root), arrangement
        self._sample: dict = {}
        self._arrangement: Arrangement | None = None
        self._stopping, self._working = threading.Event(), threading.Lock()
        self.scored: dict[str, ScoredAnswer] = {}
        super().__init__(**{"chosen": list(engines)[:2], **traits})
        models = [
            {"model": name, "label": style_of(name, index).label}
            for index, name in enumerate(self._engines)
        ]
        self.choices = {"models": models, "samples": len(self._samples)}
        if self._samples:
            try:
                self.show_sample(0)
            except (EgmError, OSError) as error:  # a run's files may be here without its images
                self.problem = str(error)
        self.on_msg(self._on_page)

    # --- the image

    def show_sample(self, number: int) -> None:
        """Shows a sample by its place in the list, with its expression."""
        if not 0 <= number < len(self._samples):
            raise InputError(
                f"there are {len(self._samples)} samples, numbered from 0; got {number}"
            )
        sample = dict(self._samples[number])
        sample["image"] = image_of(sample, self._root)
        self._arrangement = self._arrangement_of(sample)
        self.expression = sample["expression"]
        self._show_image(sample, f"sample {number + 1}", number)

    def show_file(self, image: str | Path | bytes | Image.Image, name: str = "") -> None:
        """Shows an image of one's own: a file, the bytes of one, or a PIL image.

        Raises FileNotFoundError, or ImageError for what is no image that can be read.
        """
        if isinstance(image, Image.Image):
            opened = image.convert("RGB")
        elif isinstance(image, bytes):
            opened = open_image(_NamedBytes(image, name or "the file"))
        else:
            opened, name = open_image(image), name or Path(image).name
        self._arrangement = None
        self._show_image({"image": opened}, name or "an image")

    def move(self, number: int, by_px: tuple[float, float]) -> None:
        """Moves an object of a scene; what is right is then not known any more."""
        if self._arrangement is None:
            raise InputError("the objects of this image cannot be moved")
        if not 0 <= number < len(self._arrangement.objects):
            raise InputError(f"this scene has no object {number}")
        self._arrangement = self._arrangement.moved(number, by_px)
        name = self.view["name"].removesuffix(", rearranged") + ", rearranged"
        self._show_image({"image": self._arrangement.image()}, name, self.view["number"])

    def _show_image(self, sample: dict, name: str, number: int | None = None) -> None:
        image = sample["image"]
        self._sample = {"width": image.width, "height": image.height, **sample}
        self.scored, self._asked = {}, None
        with self.hold_sync():
            self.answers, self.problem = [], ""
            self.view = {
                "name": name,
                "number": number,
                "width": image.width,
                "height": image.height,
                "image": page_data_url(image),
                "objects": [
                    {"name": thing, "box": list(box)}
                    for thing, box in (self._arrangement.objects if self._arrangement else ())
                ],
            } | self._truth()

    def _truth(self) -> dict:
        """The sample's boxes, as long as its image and its expression are unchanged."""
        known = self.expression == self._sample.get("expression")
        return {
            name: plain_box(self._sample.get(name)) if known else None
            for name in ("gt_box", "modal_box")
        }

    @property
    def _objects(self) -> list[Box] | None:
        return self._arrangement and [box for _, box in self._arrangement.objects]

    # --- asking

    def ask(
        self,
        expression: str | None = None,
        *,
        models: Sequence[str] | None = None,
        reasoning: bool = True,
    ) -> dict[str, ScoredAnswer]:
        """Asks the chosen models; returns their answers by name.

        reasoning False: answers without reasoning stand beside those that are there.
        Raises InputError for a blank expression, no image or no model. A model that fails marks
        its own answer.
        """
        questions = self._questions(expression, models, reasoning)
        self._work(partial(self._answer_all, questions))
        return {question.name: self.scored[question.name] for question in questions}

    def go_on(self, model: str, reasoning: str) -> ScoredAnswer:
        """Has a model continue a reasoning that was changed or written by hand."""
        question = self._continuation(model, reasoning)
        self._work(partial(self._answer_all, [question]))
        return self.scored[question.name]

    def stop(self) -> None:
        """Ends the answer that is being written, and those that wait for it."""
        self._stopping.set()

    def _questions(
        self, expression: str | None, models: Sequence[str] | None, reasoning: bool
    ) -> list[_Question]:
        models = list(self.chosen if models is None else models)
        expression = self.expression if expression is None else expression
        if not self._sample:
            raise InputError("there is no image yet: open a file first")
        if not expression.strip():
            raise InputError("first type what to find, such as “the red cup on the left”")
        if not models:
            raise InputError("choose a model first")
        if len(models) > MAX_MODELS:
            raise InputError(f"at most {MAX_MODELS} models at a time, got {len(models)}")
        for model in models:
            self._known(model)
        self.expression, self.chosen = expression, models
        if reasoning or expression != self._asked:
            self.scored, self._asked = {}, expression
            self.view = self.view | self._truth()
        ending = "" if reasoning else NO_REASONING
        return [_Question(model + ending, model, reasoning) for model in models]

    def _continuation(self, model: str, reasoning: str) -> _Question:
        model = self._known(model.removesuffix(EDITED).removesuffix(NO_REASONING))
        if self._asked is None:
            raise InputError("ask a question first")
        if not reasoning.strip():
            raise InputError("there is no reasoning to continue from: write some first")
        return _Question(model + EDITED, model, begun=reasoning.strip())

    def _known(self, model: str) -> str:
        if model not in self._engines:
            raise InputError(f"no model {model!r} here: use one of {', '.join(self._engines)}")
        return model

    def _work(self, work: Callable[[], None]) -> None:
        """Runs one piece of work at a time."""
        if not self._working.acquire(blocking=False):
            raise InputError("still answering; wait, or stop it first")
        try:
            self._stopping.clear()
            with self.hold_sync():
                self.busy, self.problem = True, ""
            work()
        finally:
            self.busy = False
            self._working.release()

    def _answer_all(self, questions: Sequence[_Question]) -> None:
        for question in questions:
            self._keep(question, _unfinished(""), "waiting")
        for question in questions:
            self._answer(question)

    def _answer(self, question: _Question) -> None:
        """Has a model answer; an error is an answer too."""
        written, shown_at = "", -math.inf

        def watch(text: str) -> None:
            nonlocal written, shown_at
            if self._stopping.is_set():
                raise _Stopped
            written = text
            if time.monotonic() - shown_at > REFRESH_S:
                shown_at = time.monotonic()
                self._keep(question, _unfinished(text), "writing")

        if self._stopping.is_set():
            self._keep(question, _unfinished(""), "stopped")
            return
        try:
            engine = self._engine(question.model)
            request = Request(
                self._sample["image"],
                engine.family.prompt(self.expression, self._task, name=self._prompt),
                begun_reasoning(engine.family, question.begun) if question.begun else "",
                watch,
            )
            [answer] = engine.answer([request], self._sampling, reasoning=question.reasoning)
        except _Stopped:
            self._keep(question, _unfinished(written), "stopped")
        except (EgmError, OSError) as error:  # they say what can be done
            self._keep(question, Answer.failed(str(error)))
        except (RuntimeError, ValueError, ImportError) as error:
            self._keep(question, Answer.failed(error))
        else:
            self._keep(question, answer, note="" if written else "this engine answers at once")

    def _engine(self, model: str) -> Engine:
        if model not in self._made:
            make = self._engines[model]
            if callable(make):
                for other in list(self._made)[: len(self._made) + 1 - self._engines_held]:
                    self._made.pop(other).close()
            self._made[model] = make() if callable(make) else make
        return self._made[model]

    def _keep(
        self, question: _Question, answer: Answer, status: str | None = None, note: str = ""
    ) -> None:
        """Keeps an answer and tells the page. status: of an answer that is not finished."""
        row = self._sample | self._truth()
        row |= {name: getattr(answer, name) for name in _ANSWER_FIELDS}
        row |= {"model": question.name, "expression": self.expression, "note": note or None}
        if answer.error is not None:
            row |= {"status": "error", "box": None}
        elif question.model not in self._made:
            row |= {"status": status, "box": None}
        else:
            frame = self._made[question.model].family.frame
            image_wh = (self._sample["width"], self._sample["height"])
            parsed = parse_completion(answer.raw_answer, frame=frame, image_wh=image_wh)
            row |= {"frame": frame.value, "boxes": parsed.boxes, "box": parsed.box}
            row["status"] = status or parsed.status
        if status is None and row["gt_box"] is not None:
            scored = judge(row)
        else:
            stated = (row["box"], math.nan, None, row["status"], answer.error)
            scored = ScoredAnswer(question.name, row, *stated)
        self.scored = {**self.scored, question.name: scored}
        self.answers = [
            answer_view(each, name, index, self._objects)
            for index, (name, each) in enumerate(self.scored.items())
        ]

    # --- what stands where no kernel runs

    def figure(self):
        """What the page shows, as a matplotlib figure."""
        sample = self._sample | self._truth() | {"expression": self.expression}
        sample["sample_id"] = self.view.get("name", "no image")
        names = list(self.scored)
        labels = ", ".join(model["label"] for model in self.choices["models"])
        note = "" if names else f"not asked yet: {labels}"
        return comparison_figure(
            Comparison(sample, self.scored), names, self._root, note=note, objects=self._objects
        )

    def _repr_mimebundle_(self, **kwargs):
        summary = f"Playground: {', '.join(self._engines)}"
        return png_bundle(super()._repr_mimebundle_(**kwargs), self.figure(), summary)

    # --- the page

    def _on_page(self, _, message: Mapping, buffers: Sequence) -> None:
        """What the page asks for; answers are written in a thread, so that it can stop them."""
        try:
            if message.get("do") == "stop":
                self.stop()
            elif self.busy:
                raise InputError("still answering; wait, or stop it first")
            elif message.get("do") == "ask":
                wanted = (message["expression"], message["models"], message["reasoning"])
                self._in_background(self._questions(*wanted))
            elif message.get("do") == "go on":
                self._in_background([self._continuation(message["model"], message["reasoning"])])
            elif message.get("do") == "move":
                self.move(message["number"], tuple(message["by_px"]))
            elif message.get("do") == "sample":
                self.show_sample(message["number"])
            elif message.get("do") == "open":
                self.show_file(bytes(buffers[0]), message["name"])
        except (EgmError, OSError, ValueError) as error:
            self.problem = str(error)

    def _in_background(self, questions: Sequence[_Question]) -> None:
        self.busy = True  # from now on, not only once the thread has begun
        work = partial(self._work, partial(self._answer_all, questions))
        threading.Thread(target=work, daemon=True).start()


_ANSWER_FIELDS = (
    "raw_answer",
    "error",
    "reasoning_tokens",
    "answer_tokens",
    "finish_reason",
    "latency_ms",
    "first_token_ms",
)


def _unfinished(text: str) -> Answer:
    return Answer(text, None, None, None, "stop")


class _NamedBytes(io.BytesIO):
    """Bytes of a file that error messages call by its name."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.file_name = name

    def __str__(self) -> str:
        return self.file_name
