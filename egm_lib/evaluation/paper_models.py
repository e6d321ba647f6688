"""What is known of the paper's models beside latency: shape, accuracy, tokens of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from egm_lib.evaluation.results import paper, paper_mean
from egm_lib.model_shapes import ModelShape, shape_of

DIRECT_MODEL, EGM_MODEL = "Qwen3-VL-235B-A22B-Instruct", "EGM-Qwen3-VL-8B"
# InternVL's direct answer: <ref>, the expression, <box>, four numbers; counted by Qwen's tokenizer,
# which it shares.
INTERN_ANSWER_TOKENS = 30


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper.

    kind: "direct" answers at once, "EGM" reasons in short, "thinking" at length. accuracy: percent,
    mean of Table 4's splits, or Fig. 5's where Table 4 lacks the model. answer_tokens: None where
    nobody knows; tokens_stated: the paper states them.
    """

    name: str
    kind: str
    shape: ModelShape
    accuracy: float
    answer_tokens: int | None
    tokens_stated: bool = False


@cache
def paper_models() -> tuple[PaperModel, ...]:
    """Every model of Fig. 5 and Table 4 whose shape is public, in the order of their names."""
    accuracy = {row["name"]: row["values"][1] for row in paper("fig5")["rows"]}
    accuracy |= {row["name"]: paper_mean(row) for row in paper("table4")["rows"]}
    open_models = [name for name in accuracy if "Qwen3-VL" in name or "InternVL" in name]
    return tuple(_model(name, accuracy[name]) for name in sorted(open_models) if "w/o" not in name)


def paper_model(name: str) -> PaperModel:
    """A model by its name in the paper. Raises KeyError for another one."""
    return {model.name: model for model in paper_models()}[name]


def paper_shape(name: str) -> ModelShape:
    """The shape of a model by its name in the paper.

    The paper's "InternVL-3-32B" is taken for InternVL3-38B: there is no other size near it, and its
    language model has 32 billion parameters.
    """
    name = name.removeprefix("EGM-").replace("InternVL-3-", "InternVL3-")
    return shape_of(name.replace("InternVL3-32B", "InternVL3-38B"))


def _model(name: str, accuracy: float) -> PaperModel:
    stated = {row["name"]: row["values"][0] for row in paper("teaser")["rows"]}
    if name.startswith("EGM-"):
        kind, tokens = "EGM", stated[EGM_MODEL]
    elif name.endswith("-Thinking"):
        kind, tokens = "thinking", None
    else:
        kind = "direct"
        tokens = INTERN_ANSWER_TOKENS if name.startswith("InternVL") else stated[DIRECT_MODEL]
    return PaperModel(name, kind, paper_shape(name), accuracy, tokens, name in stated)
