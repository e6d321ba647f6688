"""TraceViewer: look at images, boxes and reasoning traces, one sample at a time, thousands of
them.

    viewer = TraceViewer([run.root / "predictions"], root=run.profile.data.path)
    viewer.filter = {"show": "B solves what A misses", "a": "small-base", "b": "small-egm"}
    viewer.sample["sample_id"]         # what is looked at now

All rows stay in Python; the page gets the current sample alone, its image downscaled. In
JupyterLab 4, and in VS Code with its Jupyter extension (which may ask once to load widget scripts),
it is live as long as the kernel runs; where widgets do not run (GitHub, nbconvert, papermill's
output) the same cell shows a still image.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import anywidget
import traitlets

from egm_lib.viewer.comparison import Comparison, compare, models_in, rows_of
from egm_lib.viewer.drawing import comparison_figure
from egm_lib.viewer.page import view_of
from egm_lib.viewer.palette import look, save, styled

MAX_MODELS = 4  # more boxes on one image cannot be told apart
ANY = "any"

SHOWS: dict[str, Callable[[Comparison, str, str], bool]] = {
    "all": lambda c, a, b: True,
    "A misses": lambda c, a, b: c.failed(a),
    "A solves": lambda c, a, b: c.solved(a),
    "B solves what A misses": lambda c, a, b: c.failed(a) and c.solved(b),
    "B misses what A solves": lambda c, a, b: c.solved(a) and c.failed(b),
    "both miss": lambda c, a, b: c.failed(a) and c.failed(b),
    "A gives no box": lambda c, a, b: a in c.answers and c.answers[a].box is None,
    "B gives no box": lambda c, a, b: b in c.answers and c.answers[b].box is None,
    "a row in error": lambda c, a, b: any(answer.error for answer in c.answers.values()),
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

    predictions: prediction rows, a DataFrame, or paths of their files (a folder: every *.jsonl
    below it).
    models: which to draw, at most four; default the first four of the story. root: data root of
    relative images.
    causes: failure cause by sample_id. groups: GRPO groups
    (`training.groups.read_groups(run.groups(task))`), each
    {"sample_id", "completions": [text, ...]}
    with, where known, "rewards", "advantages", "step" and "frame" (default NORM_1000); a group
    whose sample has no prediction brings the sample's fields itself; of one sample the last counts.

    Traits to set and to read: `index` (place in what the filter leaves), `filter` (a dict of FILTER
    keys: show, a, b, split, prompt_kind, num_lookalikes, cause, search, sample_ids), `sort`,
    `hidden` (models toggled off).
    `sample`: the current sample's fields with each model's answer under "answers".
    Raises ValueError for predictions that cannot be joined, and traitlets.TraitError for an unknown
    filter or sort.
    """

    _esm = Path(__file__).parent / "viewer.js"
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
        **traits,
    ):
        self._root, self._causes = Path(root), dict(causes or {})
        self._comparisons = compare(rows_of(predictions))
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

    # --- what a notebook asks

    @property
    def sample(self) -> dict:
        """The current sample's fields; "answers": {model: {box, iou, success, status, raw_answer,
        ...}}; or {}.
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
        """Samples that the filter leaves, in order."""
        return [self._comparisons[place].sample["sample_id"] for place in self._left]

    def go_to(self, sample_id: str) -> None:
        """Shows a sample by its id. Raises KeyError where the filter does not leave it."""
        try:
            self.index = self.sample_ids.index(sample_id)
        except ValueError:
            raise KeyError(
                f"no sample {sample_id!r} among the {self.count} that the filter leaves"
            ) from None

    def figure(self):
        """What is seen, as a matplotlib figure: hidden models left out."""
        shown = [model for model in self.models if model not in self.hidden]
        if not self._left:
            return comparison_figure(
                Comparison({"expression": "no sample matches"}, {}), [], self._root
            )
        note, group = self._causes.get(self._id(), ""), self.view.get("group")
        return comparison_figure(self._current(), shown, self._root, note=note, group=group)

    def export(self, path: str | Path, dpi: int = 200) -> Path:
        """Writes what is seen as .png, .svg or .pdf."""
        return save(self.figure(), path, dpi)

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        words = f"TraceViewer: {self.total} samples of {', '.join(self.models) or 'no model'}"
        return {
            **data,
            "text/plain": words,
            "image/png": base64.b64encode(self._bytes("png")).decode(),
        }, metadata

    # --- behind it

    def _current(self) -> Comparison:
        return self._comparisons[self._left[self.index]]

    def _id(self) -> str:
        return self._current().sample["sample_id"]

    def _bytes(self, kind: str) -> bytes:
        file = io.BytesIO()
        with styled():
            self.figure().savefig(file, format=kind, dpi=110 if kind == "png" else 200)
        return file.getvalue()

    @property
    def _pair(self) -> tuple[str, str]:
        """Models A and B of filter and sort: as the filter says, else the first two that are
        shown.
        """
        first = self.models[0] if self.models else ""
        second = self.models[1] if len(self.models) > 1 else first
        return self.filter.get("a") or first, self.filter.get("b") or second

    def _choices(self) -> dict:
        values = {
            field: sorted(
                {self._value(each, field) for each in self._comparisons} - {None}, key=_natural
            )
            for field in _FIELDS
        }
        models = [
            {"model": name, "label": look(name, place).label}
            for place, name in enumerate(self.models)
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
        stays = (
            self._left[self.index] if change is not None and self.index < len(self._left) else None
        )
        show, (a, b) = SHOWS[self.filter.get("show", "all")], self._pair
        fields = {field: self.filter[field] for field in _FIELDS if field in self.filter}
        words = str(self.filter.get("search", "")).lower().split()
        ids = set(self.filter["sample_ids"]) if "sample_ids" in self.filter else None
        left = []
        for place, comparison in enumerate(self._comparisons):
            sample = comparison.sample
            text = str(sample.get("expression", "")).lower()
            if (
                all(word in text for word in words)
                and (ids is None or sample["sample_id"] in ids)
                and all(self._value(comparison, field) == value for field, value in fields.items())
                and show(comparison, a, b)
            ):
                left.append(place)
        if self.sort != SORTS[0]:
            sign = 1 if self.sort.endswith("low first") else -1
            gain = self.sort.startswith("gain")

            def key(place: int) -> float:
                comparison = self._comparisons[place]
                value = comparison.iou(b) - comparison.iou(a) if gain else comparison.iou(a)
                return math.inf if math.isnan(value) else sign * value  # not run: last

            left.sort(key=key)
        with self.hold_sync():
            self._left, self.count, self.total = left, len(left), len(self._comparisons)
            self.index = left.index(stays) if stays in left else 0
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
        )

    def _answer_page(self, _, message: Mapping, buffers) -> None:
        """The page asks for a file of what is seen."""
        if message.get("export") in ("png", "svg") and self._left:
            kind = message["export"]
            self.send(
                {"export": kind, "name": f"{_file_safe(self._id())}.{kind}"},
                buffers=[self._bytes(kind)],
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


def _natural(value) -> tuple[bool, object]:
    return isinstance(value, str), value


def _file_safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_+." else "_" for letter in name)[:80]
