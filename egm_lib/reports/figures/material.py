"""What figures are made of: scored results, prediction rows, parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from egm_lib.boxes import Box
from egm_lib.evaluation.results import Results
from egm_lib.mini.world import objects_in
from egm_lib.profile import Data, ProfileError, load_profile
from egm_lib.viewer.comparison import OUTCOMES, Comparison, compare, rows_of

SMALL, EGM, LARGE = "small-base", "small-egm", "large-base"
DRAWS = 1000  # of a bootstrap


class NotRun(Exception):
    """The files that a figure needs are absent; the message says which."""


@dataclass(frozen=True)
class Drawn:
    """A figure that was made (files), or the reason why it was not (not_run)."""

    name: str
    title: str
    caption: str = ""
    not_run: str = ""
    files: tuple[str, ...] = ()


class Material:
    """Scored results, whole prediction rows where text or images are shown, and parameters."""

    def __init__(self, results: Results, root: Path, parameters: Mapping[str, int]):
        self.results, self.root, self.parameters = results, root, parameters

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The first seed's small base, EGM and large base, sample by sample."""
        folder = self.results.roots[0] / "predictions"
        return compare(
            rows_of([folder / name for name in (SMALL, EGM, LARGE) if (folder / name).is_dir()])
        )

    @cached_property
    def _data(self) -> Data | None:
        return data_of(self.results)

    def objects(self, sample: Mapping) -> list[Box] | None:
        """Boxes (xyxy px) of every object in a sample's image; None where they are not known."""
        return self._data and objects_in(sample, self._data)

    def of(self, task: str) -> list[Comparison]:
        """The samples of a task."""
        return [sample for sample in self.comparisons if sample.sample.get("task") == task]

    def with_outcome(self, task: str, outcome: str) -> list[Comparison]:
        """The samples of a task with an outcome of OUTCOMES, where a is the base and b EGM."""
        return [sample for sample in self.of(task) if OUTCOMES[outcome](sample, SMALL, EGM)]

    def needed(self, model: str, task: str = "vanilla") -> pd.DataFrame:
        """Scored rows of a model; raises NotRun if there are none."""
        rows = self.results.of(model, task)
        if rows.empty:
            raise NotRun(f"no {task} predictions of {model}")
        return rows


def outcome_title(outcome: str) -> str:
    """An outcome of OUTCOMES in words: "EGM solves what the base misses"."""
    if outcome.startswith("b "):
        outcome = f"EGM {outcome.removeprefix('b ')}"
    return outcome.replace("what a ", "what the base ")


def data_of(results: Results) -> Data | None:
    """The profile's data; None for an unknown profile."""
    try:
        return load_profile(results.profile).data
    except ProfileError:
        return None


def data_root(results: Results) -> Path:
    """Where the images of the profile lie; the working directory for an unknown profile."""
    data = data_of(results)
    return data.path if data else Path(".")


def parameters_of(results: Results) -> dict[str, int]:
    """Parameters by model, counted in the headers of the safetensors files that are here."""
    from safetensors import safe_open

    try:
        models = load_profile(results.profile).models
    except ProfileError:
        return {}
    counts = {}
    for name, model in models.by_role().items():
        total = 0
        for file in sorted(Path(model.location).glob("*.safetensors")):
            with safe_open(file, framework="np") as tensors:
                names = tensors.keys()
                total += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in names)
        if total:
            counts[name] = total
    sizes = {model: model.partition("-")[0] for model in results.models}
    return {model: counts[size] for model, size in sizes.items() if size in counts}
