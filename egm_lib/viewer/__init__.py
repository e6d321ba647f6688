"""TraceViewer: look through images, boxes and reasoning traces, one sample at a time.

    viewer = TraceViewer([run.root / "predictions"], root=run.profile.data.path)
    viewer.filter = {"show": "B solves what A misses", "a": "small-base", "b": "small-egm"}
    viewer.sample["sample_id"]         # the sample on show

All rows stay in Python; the page gets only the current sample, with its image downscaled. The
widget is live in JupyterLab 4, and in VS Code with its Jupyter extension (which may ask once to
load widget scripts), as long as the kernel runs. Where widgets do not run (GitHub, nbconvert,
papermill's output) the same cell shows a still image.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import anywidget
import traitlets

from egm_lib.boxes import Box
from egm_lib.viewer.comparison import (
    OUTCOMES,
    Comparison,
    compare,
    identified,
    models_in,
    readable,
    rows_of,
)
from egm_lib.viewer.drawing import comparison_figure
from egm_lib.viewer.page import page_script, view_of
from egm_lib.viewer.palette import save, style_of
from egm_lib.viewer.playground import MAX_MODELS, Playground
from egm_lib.viewer.still import DPI, figure_bytes, png_bundle

__all__ = ["Playground", "TraceViewer"]
ANY = "any"

SHOWS: dict[str, Callable[[Comparison, str, str], bool]] = {
    "all": lambda sample, a, b: True,
    "A misses": lambda sample, a, b: sample.failed(a),
    "A solves": lambda sample, a, b: sample.solved(a),
    "B solves what A misses": OUTCOMES["b solves what a misses"],
    "B misses what A solves": OUTCOMES["b misses what a solves"],
    "both miss": OUTCOMES["both miss"],
    "A gives no box": lambda sample, a, b: a in sample.answers and sample.answers[a].box is None,
    "B gives no box": lambda sample, a, b: b in sample.answers and sample.answers[b].box is None,
    "a row in error": lambda sample, a, b: any(answer.error for answer in sample.answers.values()),
}
SORTS = (
    "as read",
    "IoU of A, low first",
    "IoU of A, high first",
    "gain A to B, high first",
    "gain A to B, low first",
)
_FIELDS = ("split", "prompt_kind", "num_lookalikes", "cause")
_FILTER_KEYS = ("show", "a", "b", *_FIELDS, "search", "sample_ids")


class TraceViewer(anywidget.AnyWidget):
    """Images, boxes and reasoning of one to four models, sample by sample.

    predictions: prediction rows, a DataFrame, or paths of their files; a folder stands for every
    *.jsonl below it.
    models: which models to draw, at most four; default: the first four of a run.
    root: the data root, to which the rows' image paths are relative.
    causes: failure cause by sample_id.
    groups: GRPO groups (`egm_lib.training.groups.read_groups(run.groups(task))`), each
    {"sample_id", "completions": [text, ...]} and, where known, "rewards", "advantages", "step" and
    "frame" (default NORM_1000). A group whose sample has no prediction holds the sample's fields
    itself. If a sample has several groups, the last one is shown.
    objects: boxes (xyxy px) of every object in the image of a sample, None where they are not
    known: a step of a trace that lies on none of them is marked.

    Traits to set and to read: `index` (position among the samples that the filter leaves),
    `filter` (a dict of show, a, b, split, prompt_kind, num_lookalikes, cause, search, sample_ids),
    `sort`, `hidden` (models whose boxes are hidden).
    `sample`: the current sample's fields, with each model's answer under "answers".
    Raises ValueError for predictions that cannot be joined, and traitlets.TraitError for an unknown
    filter or sort.
    """

    _esm = page_script("viewer")
    _css = Path(__file__).parent / "viewer.css"

    index = traitlets.Int(0).tag(sync=True)
    filter = traitlets.Dict({}).tag(sync=True)
    sort = traitlets.Unicode(SORTS[0]).tag(sync=True)
    hidden = traitlets.List(traitlets.Unicode()).tag(sync=True)
    total = traitlets.Int(0).tag(sync=True)
    count = traitlets.Int(0).tag(sync=True)
    choices = traitlets.Dict({}).tag(sync=True)
    view = traitlets.Dict({}).tag(sync=True)

    def __init__(
        self,
        predictions=(),
        *,
        models: Sequence[str] | None = None,
        root: str | Path = ".",
        causes: Mapping[str, str] | None = None,
        groups: Iterable[Mapping] = (),
        objects: Callable[[Mapping], Sequence[Box] | None] = lambda sample: None,
        **traits,
    ):
        self._root, self._causes, self._objects = Path(root), causes or {}, objects
        self._comparisons = compare(rows_of(predictions))
        groups = [readable(identified(group, number)) for number, group in enumerate(groups, 1)]
        self._groups = {group["sample_id"]: group for group in groups}
        known = {comparison.sample["sample_id"] for comparison in self._comparisons}
        self._comparisons += [
            Comparison(group, {}) for name, group in self._groups.items() if name not in known
        ]
        found = models_in(self._comparisons)
        self.models = list(models) if models is not None else found[:MAX_MODELS]
        if len(self.models) > MAX_MODELS:
            raise ValueError(
                f"at most {MAX_MODELS} models at a time, got {len(self.models)}: "
                f"{', '.join(self.models)}"
            )
        if missing := [model for model in self.models if model not in found]:
            raise ValueError(
                f"no predictions of {', '.join(missing)}; there are those of "
                f"{', '.join(found) or 'none'}"
            )
        self._left: list[int] = list(range(len(self._comparisons)))
        super().__init__(**traits)
        self.choices = self._choices()
        self._refilter()
        self.on_msg(self._answer_page)

    # --- what a notebook uses

    @property
    def sample(self) -> dict:
        """The current sample's fields, and "answers": {model: {box, iou, success, ...}}.

        {} where the filter leaves no sample.
        """
        if not self._left:
            return {}
        comparison = self._current()
        shown = {
            model: {
                "box": answer.box,
                "iou": answer.iou,
                "success": answer.success,
                "status": answer.status,
                "reasoning": answer.row.get("reasoning"),
                "raw_answer": answer.row.get("raw_answer"),
            }
            for model, answer in comparison.answers.items()
        }
        fields = {
            key: value for key, value in comparison.sample.items() if key not in _ANSWER_FIELDS
        }
        return fields | {"answers": shown}

    @property
    def sample_ids(self) -> list[str]:
        """The samples that the filter leaves, in order."""
        return [self._comparisons[index].sample["sample_id"] for index in self._left]

    def go_to(self, sample_id: str) -> None:
        """Shows a sample by its id. Raises KeyError where the filter leaves it out."""
        try:
            self.index = self.sample_ids.index(sample_id)
        except ValueError:
            raise KeyError(
                f"no sample {sample_id!r} among the {self.count} that the filter leaves"
            ) from None

    def figure(self):
        """What the page shows, as a matplotlib figure, without the hidden models."""
        shown = [model for model in self.models if model not in self.hidden]
        if not self._left:
            return comparison_figure(
                Comparison({"expression": "no sample matches"}, {}), [], self._root
            )
        return comparison_figure(
            self._current(),
            shown,
            self._root,
            note=self._causes.get(self._id(), ""),
            group=self.view.get("group"),
            objects=self._objects(self._current().sample),
        )

    def export(self, path: str | Path, dpi: int = 200) -> Path:
        """Writes what the page shows as .png, .svg or .pdf."""
        return save(self.figure(), path, dpi)

    def _repr_mimebundle_(self, **kwargs):
        summary = f"TraceViewer: {self.total} samples of {', '.join(self.models) or 'no model'}"
        return png_bundle(super()._repr_mimebundle_(**kwargs), self.figure(), summary)

    # --- how it works

    def _current(self) -> Comparison:
        return self._comparisons[self._left[self.index]]

    def _id(self) -> str:
        return self._current().sample["sample_id"]

    @property
    def _pair(self) -> tuple[str, str]:
        """Models A and B of filter and sort: those of the filter, else the first two shown."""
        first = self.models[0] if self.models else ""
        second = self.models[1] if len(self.models) > 1 else first
        return self.filter.get("a") or first, self.filter.get("b") or second

    def _choices(self) -> dict:
        values = {
            field: sorted(
                {self._value(sample, field) for sample in self._comparisons} - {None},
                key=_text_last,
            )
            for field in _FIELDS
        }
        models = [
            {"model": name, "label": style_of(name, index).label}
            for index, name in enumerate(self.models)
        ]
        return {"show": list(SHOWS), "sort": list(SORTS), "models": models, **values}

    def _value(self, comparison: Comparison, field: str):
        sample = comparison.sample
        if field == "cause":
            return self._causes.get(sample["sample_id"])
        if field == "split" and sample.get("dataset"):
            return f"{sample['dataset']}_{sample.get('split')}"
        return sample.get(field)

    @traitlets.validate("filter")
    def _check_filter(self, proposal):
        wanted = {
            key: value for key, value in proposal["value"].items() if value not in (None, "", ANY)
        }
        for key, value in wanted.items():
            if key not in _FILTER_KEYS:
                raise traitlets.TraitError(f"unknown filter {key!r}: use {', '.join(_FILTER_KEYS)}")
            allowed = {"show": SHOWS, "a": self.models, "b": self.models}.get(key)
            if allowed is not None and value not in allowed:
                raise traitlets.TraitError(
                    f"filter {key!r} is one of {', '.join(map(repr, allowed))}; got {value!r}"
                )
        return wanted

    @traitlets.validate("sort")
    def _check_sort(self, proposal):
        if proposal["value"] not in SORTS:
            raise traitlets.TraitError(
                f"sort is one of {', '.join(map(repr, SORTS))}; got {proposal['value']!r}"
            )
        return proposal["value"]

    @traitlets.validate("index")
    def _check_index(self, proposal):
        return max(0, min(proposal["value"], len(self._left) - 1))

    @traitlets.observe("filter", "sort")
    def _refilter(self, change=None) -> None:
        current = None
        if change is not None and self.index < len(self._left):
            current = self._left[self.index]
        show, (a, b) = SHOWS[self.filter.get("show", "all")], self._pair
        fields = {field: self.filter[field] for field in _FIELDS if field in self.filter}
        words = str(self.filter.get("search", "")).lower().split()
        ids = set(self.filter["sample_ids"]) if "sample_ids" in self.filter else None
        left = []
        for index, comparison in enumerate(self._comparisons):
            sample = comparison.sample
            text = str(sample.get("expression", "")).lower()
            if (
                all(word in text for word in words)
                and (ids is None or sample["sample_id"] in ids)
                and all(self._value(comparison, field) == value for field, value in fields.items())
                and show(comparison, a, b)
            ):
                left.append(index)
        if self.sort != SORTS[0]:
            sign = 1 if self.sort.endswith("low first") else -1
            gain = self.sort.startswith("gain")

            def key(index: int) -> float:
                comparison = self._comparisons[index]
                value = comparison.iou(b) - comparison.iou(a) if gain else comparison.iou(a)
                return math.inf if math.isnan(value) else sign * value  # not run: last

            left.sort(key=key)
        with self.hold_sync():
            self._left, self.count, self.total = left, len(left), len(self._comparisons)
            self.index = left.index(current) if current in left else 0
            self._show()

    @traitlets.observe("index")
    def _show(self, change=None) -> None:
        if not self._left:
            self.view = {}
            return
        name = self._id()
        self.view = view_of(
            self._current(),
            self.models,
            root=self._root,
            group=self._groups.get(name),
            causes={"cause": self._causes[name]} if name in self._causes else None,
            objects=self._objects(self._current().sample),
        )

    def _answer_page(self, _, message: Mapping, buffers) -> None:
        """Sends the page a file of what it shows."""
        if message.get("export") in ("png", "svg") and self._left:
            kind = message["export"]
            self.send(
                {"export": kind, "name": f"{_file_safe(str(self._id()))}.{kind}"},
                buffers=[figure_bytes(self.figure(), kind, DPI if kind == "png" else 200)],
            )


_ANSWER_FIELDS = {
    "model",
    "revision",
    "prompt",
    "raw_answer",
    "frame",
    "reasoning",
    "boxes",
    "box",
    "status",
    "error",
    "prompt_tokens",
    "reasoning_tokens",
    "answer_tokens",
    "finish_reason",
    "latency_ms",
}


def _text_last(value) -> tuple[bool, object]:
    return isinstance(value, str), value


def _file_safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_+." else "_" for letter in name)[:80]
