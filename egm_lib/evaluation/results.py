"""The files of the runs of one profile, read once: the input of tables and figures."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from egm_lib.curation.tasks import CAUSES
from egm_lib.errors import InputError
from egm_lib.evaluation.scoring import (
    SCORING_COLUMNS,
    TOKEN_COLUMNS,
    load_predictions,
    numeric,
    score,
)
from egm_lib.files import project_root, read_json, read_jsonl, writable_row

MODELS = (
    "small-base",
    "small-sft",
    "small-egm",
    "small-egm-no-reasoning",
    "small-direct-control",
    "small-sft-control",
    "large-base",
)
LATENCY_COLUMNS = (
    "sample_id",
    "model",
    "concurrency",
    "device",
    "latency_ms",
    "first_token_ms",
    *TOKEN_COLUMNS,
)
LATENCY_FIELDS = {"sample_id": str | int, "model": str, "concurrency": int, "device": str}
PROMPT_FIELDS = {
    "model": str,
    "task": str,
    "prompt": str,
    "answers": str,
    "not_asked": str | None,
}
JUDGEMENT_FIELDS = {"sample_id": str | int, "judge": str, "cause": str}
PAPER_DIR = project_root() / "data" / "paper"


log = logging.getLogger(__name__)


def _complete(path: Path, needed: Mapping[str, type]) -> list[dict]:
    """The rows of a file that have the needed fields, each of its kind; the others are left out
    with a warning.
    """
    rows = read_jsonl(path)
    complete = [
        writable_row(row)
        for row in rows
        if all(isinstance(row.get(name), kind) for name, kind in needed.items())
    ]
    if len(complete) < len(rows):
        message = "%s: %d rows without %s are left out"
        log.warning(message, path, len(rows) - len(complete), ", ".join(needed))
    return complete


@cache
def paper(name: str) -> dict:
    """A published table or figure of data/paper, such as "table4" or "fig5"."""
    return json.loads((PAPER_DIR / f"{name}.json").read_text(encoding="utf-8"))


def paper_mean(row: dict) -> float:
    """The mean over the splits in a row of Table 4 or 10, in percent: as printed in the paper, or
    else computed from its splits.
    """
    return row["mean_of_splits"] if row["mean_printed"] is None else row["mean_printed"]


def paper_models(profile: str) -> tuple[dict[str, str], bool]:
    """The paper's counterpart of each model of a profile, and whether they are the same models."""
    matching = [row for row in paper("models")["rows"] if profile.startswith(row["profiles"])]
    best = max(matching, key=lambda row: len(row["profiles"]))
    return best["models"], best["same"]


class Results:
    """The runs of one profile, one a seed; predictions are scored by `rule` when first asked for.

    run_roots: folders data/runs/<profile>-<seed>. A file that a run lacks counts as empty. A row
    that lacks a field is left out with a warning.
    Raises FileNotFoundError if none of the folders exists, ValueError if they are of several
    profiles.
    """

    def __init__(self, run_roots: Sequence[Path], rule: str = "egm", draws: int = 2000):
        self.roots = [Path(root) for root in run_roots if Path(root).is_dir()]
        if not self.roots:
            tried = ", ".join(map(str, run_roots))
            raise FileNotFoundError(f"no run in {tried}; `make reproduce` makes one")
        self.rule, self.draws = rule, draws
        names = {root.name.rpartition("-")[0] for root in self.roots}
        if len(names) > 1:
            raise InputError(
                f"runs of several profiles ({', '.join(sorted(names))}): make the tables of one at "
                "a time"
            )
        self.profile = names.pop()
        self.paper_models, self.same_models = paper_models(self.profile)
        self.seeds = [
            int(tail) if (tail := root.name.rpartition("-")[2]).isdigit() else tail
            for root in self.roots
        ]

    @cached_property
    def manifests(self) -> list[dict]:
        return [
            manifest
            for root in self.roots
            if (manifest := read_json(root / "manifest.json", shape=dict)) is not None
        ]

    def stated(self, key: str):
        """What the manifests say under a key: a value, a list where they differ, or None."""
        values = [manifest[key] for manifest in self.manifests if key in manifest]
        if not values:
            return None
        return values[0] if all(value == values[0] for value in values) else values

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """Every prediction row of every seed, unscored; the seed is the run's.

        A row that does not say which model answered which sample is left out with a warning.
        """
        parts = []
        for root, seed in zip(self.roots, self.seeds, strict=True):
            files = sorted((root / "predictions").glob("*/*.jsonl"))
            if files:
                parts.append(load_predictions(files, SCORING_COLUMNS).assign(seed=seed))
        if not parts:
            return pd.DataFrame(columns=list(SCORING_COLUMNS))
        rows = pd.concat(parts, ignore_index=True)
        complete = rows.dropna(subset=["sample_id", "model", "dataset", "split", "task"])
        if len(complete) < len(rows):
            missing = len(rows) - len(complete)
            log.warning("%s: %d prediction rows are incomplete and left out", self.profile, missing)
        return complete.reset_index(drop=True)

    @cached_property
    def scored(self) -> pd.DataFrame:
        return self.score(self.rule)

    def score(self, rule: str) -> pd.DataFrame:
        """All predictions as `rule` reads them."""
        return score(self.predictions, rule)

    @cached_property
    def models(self) -> list[str]:
        """Models with predictions: MODELS in their order, then others by name; no variants."""
        found = {model for model in set(self.predictions["model"]) if "@" not in model}
        return [name for name in MODELS if name in found] + sorted(found - set(MODELS))

    @cached_property
    def variants(self) -> list[str]:
        """Models decoded in another way or asked with another prompt, by way and number, such as
        small-egm@budget-16 and small-base@prompt-authors-eval.
        """
        found = {model for model in set(self.predictions["model"]) if "@" in model}

        def key(model: str) -> tuple[str, int]:
            way, _, number = model.rpartition("-")
            return way, int(number) if number.isdigit() else 0

        return sorted(found, key=key)

    @cached_property
    def _by_model_and_task(self) -> dict[tuple[str, str], pd.DataFrame]:
        return dict(list(self.scored.groupby(["model", "task"], sort=False)))

    def of(self, model: str, task: str = "vanilla") -> pd.DataFrame:
        """Scored rows of one model and task (no rows where it was not run)."""
        rows = self._by_model_and_task.get((model, task))
        return self.scored.iloc[:0] if rows is None else rows

    @cached_property
    def validation(self) -> pd.DataFrame:
        """Scored answers to the validation split (`predict --validation`)."""
        parts = [
            load_predictions(root / "validation", SCORING_COLUMNS).assign(seed=seed)
            for root, seed in zip(self.roots, self.seeds, strict=True)
            if (root / "validation").is_dir()
        ]
        return self._score_parts(parts, self.predictions.iloc[:0])

    def _score_parts(self, parts: Sequence[pd.DataFrame], none: pd.DataFrame) -> pd.DataFrame:
        """Scored rows of all parts; without parts those of `none`, which has the columns alone."""
        return score(pd.concat(parts, ignore_index=True) if parts else none, self.rule)

    @cached_property
    def ablations(self) -> pd.DataFrame:
        """Scored answers of the ablations; model is the variant, steps its GRPO steps."""
        parts = []
        for root, seed in zip(self.roots, self.seeds, strict=True):
            for answers in sorted((root / "ablations").glob("*-steps/answers")):
                rows = load_predictions(answers, SCORING_COLUMNS)
                parts.append(
                    rows.assign(seed=seed, steps=int(answers.parent.name.removesuffix("-steps")))
                )
        return self._score_parts(parts, self.predictions.iloc[:0].assign(steps=0))

    @cached_property
    def prompts(self) -> list[dict]:
        """With which named prompts models were asked, or why not (`pipeline.prompt_ablation`).

        Where seeds state the same prompt, the first one's row.
        """
        stated = {}
        for root in self.roots:
            for file in sorted((root / "ablations" / "prompts").glob("*.jsonl")):
                for row in _complete(file, PROMPT_FIELDS):
                    stated.setdefault((row["model"], row["task"], row["prompt"]), row)
        return list(stated.values())

    @cached_property
    def latency(self) -> pd.DataFrame:
        """Rows of the latency protocol, of every seed."""
        rows = [
            row
            for root in self.roots
            for file in sorted((root / "latency").glob("*.jsonl"))
            for row in _complete(file, LATENCY_FIELDS)
        ]
        frame = pd.DataFrame([{name: row.get(name) for name in LATENCY_COLUMNS} for row in rows])
        frame = frame.reindex(columns=LATENCY_COLUMNS)
        numbers = ["latency_ms", "first_token_ms", *TOKEN_COLUMNS]
        frame[numbers] = frame[numbers].apply(numeric)
        return frame

    @cached_property
    def failures(self) -> pd.DataFrame:
        """Judgements of failures: model, seed, sample_id, judge, cause, and the image_id."""
        rows = [
            {
                "model": file.stem,
                "seed": seed,
                **{key: row[key] for key in ("sample_id", "judge", "cause")},
            }
            for root, seed in zip(self.roots, self.seeds, strict=True)
            for file in sorted((root / "failures").glob("*.jsonl"))
            for row in _complete(file, JUDGEMENT_FIELDS)
            if row["cause"] in CAUSES
        ]
        frame = pd.DataFrame(rows, columns=["model", "seed", "sample_id", "judge", "cause"])
        known = self.predictions[["sample_id", "image_id", "dataset", "split"]]
        frame = frame.merge(known.drop_duplicates("sample_id"), on="sample_id", how="left")
        # If the image is unknown, the sample forms a cluster by itself.
        return frame.assign(image_id=frame["image_id"].fillna(frame["sample_id"]))

    @cached_property
    def judges(self) -> list[str]:
        return list(dict.fromkeys(self.failures["judge"]))

    def majority_causes(self, model: str) -> pd.DataFrame:
        """One row a judged failure: the cause that most judges name, or "no majority"."""
        rows = self.failures[self.failures["model"] == model]
        return pd.DataFrame(
            [
                {
                    "seed": seed,
                    "sample_id": sample_id,
                    "image_id": group["image_id"].iloc[0],
                    "cause": _majority(group["cause"]),
                }
                for (seed, sample_id), group in rows.groupby(["seed", "sample_id"], sort=False)
            ],
            columns=["seed", "sample_id", "image_id", "cause"],
        )

    def seconds(self) -> dict[str, float]:
        """Wall time by stage, mean over the seeds."""
        times: dict[str, list[float]] = {}
        for manifest in self.manifests:
            stated = manifest.get("wall_seconds")
            for stage, seconds in stated.items() if isinstance(stated, dict) else ():
                if isinstance(seconds, int | float):
                    times.setdefault(stage, []).append(seconds)
        return {stage: round(float(np.mean(values)), 1) for stage, values in times.items()}


def _majority(causes: Sequence[str]) -> str:
    cause, count = Counter(causes).most_common(1)[0]
    return cause if count * 2 > len(causes) else "no majority"
