"""The hypotheses of docs/protocol.md, and how the numbers answer them.

Two runs are compared: in one the teacher works every trace out ("uniform"), in the other
the traces differ in how useful they are ("varied"). The thresholds below are those of the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from egm_lib.evaluation.results import Results
from egm_lib.evaluation.statistics import Difference, difference_of, holm, pair
from egm_lib.prompts import Task

Claim = Literal["better", "at least as good", "equal"]
Teacher = Literal["varied", "uniform", "both"]
Status = Literal["holds", "does not hold", "not told apart", "not run"]

MARGIN = 0.03  # a smaller difference is treated as none
LEVEL = 0.05
EGM, SFT = "small-egm", "small-sft"


@dataclass(frozen=True)
class Hypothesis:
    """`model` compared with `other`, on the test splits of the same seeds.

    teacher "both": the difference under the varied teacher, less that under the uniform one.
    alone: tested at 5 % by itself; the other claims of "better" are one family for Holm.
    """

    name: str
    says: str
    claim: Claim
    model: str
    other: str
    task: Task = "vanilla"
    teacher: Teacher = "varied"
    alone: bool = False


@dataclass(frozen=True)
class Finding:
    """What the runs say; None if one of them is missing. p_value: after Holm."""

    hypothesis: Hypothesis
    difference: Difference | None
    p_value: float | None
    status: Status
    small: bool  # it holds, by less than the margin


def _amodal(of: Hypothesis) -> Hypothesis:
    name = f"{of.name}a"
    return Hypothesis(name, of.says, of.claim, of.model, of.other, "amodal")


_VANILLA = (
    Hypothesis(
        "H1", "GRPO gains more than SFT continued", "better", EGM, "small-sft-control", alone=True
    ),
    Hypothesis("H2", "GRPO improves the SFT model", "better", EGM, SFT),
    Hypothesis(
        "H3", "with the uniform teacher GRPO changes nothing", "equal", EGM, SFT, teacher="uniform"
    ),
    Hypothesis(
        "H4",
        "GRPO gains more over SFT continued where the teacher varies",
        "better",
        EGM,
        "small-sft-control",
        teacher="both",
    ),
    Hypothesis("H5", "EGM improves its base", "better", EGM, "small-base"),
    Hypothesis(
        "H6", "reasoning is worth more than direct answers", "better", EGM, "small-direct-control"
    ),
    Hypothesis(
        "H7", "EGM is at least as good as the large base", "at least as good", EGM, "large-base"
    ),
    Hypothesis("H8", "EGM is worse without its reasoning", "better", EGM, "small-egm-no-reasoning"),
    Hypothesis(
        "H9",
        "selected prompts are at least as good as prompts drawn at random",
        "at least as good",
        EGM,
        "small-egm-unselected",
    ),
)
WITH_AMODAL = ("H1", "H2", "H5", "H6", "H7", "H8")
HYPOTHESES = (*_VANILLA, *(_amodal(of) for of in _VANILLA if of.name in WITH_AMODAL))


def findings(results: Mapping[str, Results], *, draws: int = 2000) -> list[Finding]:
    """Every hypothesis with its difference, its p and its status.

    results: by teacher, "varied" and "uniform"; one that is absent counts as not run.
    """
    differences = [_difference(of, results, draws) for of in HYPOTHESES]
    family = [
        number
        for number, (of, found) in enumerate(zip(HYPOTHESES, differences, strict=True))
        if of.claim == "better" and not of.alone and found and found.p_value is not None
    ]
    adjusted = holm([differences[number].p_value for number in family])
    p_values: dict[int, float | None] = dict(zip(family, adjusted, strict=True))
    answered = []
    for number, (of, found) in enumerate(zip(HYPOTHESES, differences, strict=True)):
        alone = found.p_value if found and of.alone else None
        p_value = p_values.get(number, alone)
        status = status_of(of.claim, found, p_value)
        small = status == "holds" and of.claim == "better" and within_margin(found)
        answered.append(Finding(of, found, p_value, status, small))
    return answered


def _difference(of: Hypothesis, results: Mapping[str, Results], draws: int) -> Difference | None:
    teachers: Sequence[str] = ("varied", "uniform") if of.teacher == "both" else (of.teacher,)
    if any(teacher not in results for teacher in teachers):
        return None
    pairs = [
        pair(results[name].of(of.model, of.task), results[name].of(of.other, of.task))
        for name in teachers
    ]
    if any(both.empty for both in pairs):
        return None
    if of.teacher != "both":
        return difference_of(pairs[0], over_splits=True, draws=draws)
    varied, uniform = (both.assign(gain=both["a"].astype(float) - both["b"]) for both in pairs)
    gains = pair(varied, uniform, "gain")
    return None if gains.empty else difference_of(gains, over_splits=True, draws=draws)


def within_margin(found: Difference | None) -> bool:
    """Whether the whole interval lies within the margin around 0."""
    return bool(found and found.ci95) and max(map(abs, found.ci95)) < MARGIN


def status_of(claim: Claim, found: Difference | None, p_value: float | None) -> Status:
    """The protocol's table "holds, does not hold, not told apart". p_value: after Holm."""
    if found is None or found.ci95 is None:
        return "not run"
    low, high = found.ci95
    if claim == "better":
        if p_value is not None and p_value < LEVEL and found.mean > 0:
            return "holds"
        return "does not hold" if high < 0 or within_margin(found) else "not told apart"
    if claim == "at least as good":
        if low > -MARGIN:
            return "holds"
        return "does not hold" if high < 0 else "not told apart"
    if within_margin(found):
        return "holds"
    return "does not hold" if low > 0 or high < 0 else "not told apart"
