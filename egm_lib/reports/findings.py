"""What a run's numbers say, in sentences that are made from the numbers and hold on any profile.

Notebooks show them below their figures and tables. A finding whose files are absent is "not run".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from egm_lib.errors import InputError
from egm_lib.evaluation.results import Results
from egm_lib.evaluation.statistics import Difference, Estimate, estimate
from egm_lib.files import read_json, read_jsonl
from egm_lib.reports.curated import outcomes
from egm_lib.reports.tables.beyond_paper import latency_stats
from egm_lib.reports.tables.cells import decimal_text
from egm_lib.reports.tables.paper import cause_shares, gain

BASE, LARGE, HUGE = "small-base", "large-base", "huge-base"
SFT, EGM = "small-sft", "small-egm"
# (model, compared with, what it would mean that the first is better)
QUESTIONS = (
    (EGM, BASE, "Learning to reason helps the small model"),
    (EGM, "small-direct-control", "It helps more than direct training does"),
    (EGM, LARGE, "The small model that reasons is better than the large base"),
    (EGM, HUGE, "The small model that reasons is better than the huge base"),
    (EGM, "small-egm-no-reasoning", "The model needs the reasoning that it writes"),
    (EGM, SFT, "GRPO adds to SFT"),
    (EGM, "small-sft-control", "GRPO adds more than continued SFT does"),
)
MIN_GROUP = 30  # ours: a kind of prompt with fewer samples is not named


def findings(results: Results, topic: str) -> str:
    """Sentences on a topic, as Markdown. Raises KeyError for an unknown topic."""
    sentences = list(TOPICS[topic](results))
    return " ".join(sentences) if sentences else f"{topic}: not run."


def _percent(value: Estimate) -> str:
    return f"{decimal_text(100 * value.mean)} %{_interval(value)}"


def _points(value: Difference) -> str:
    return f"{decimal_text(100 * value.mean, signed=True)} points{_interval(value)}"


def _interval(value: Estimate | Difference) -> str:
    if value.ci95 is None:
        return ""
    low, high = (decimal_text(100 * end) for end in value.ci95)
    return f" [{low}, {high}]"


def _verdict(value: Difference, claim: str) -> str:
    """A claim with the word for what the interval says about it."""
    if value.ci95 is None:
        word = "too few samples to tell"
    elif value.ci95[0] > 0:
        word = "yes"
    elif value.ci95[1] < 0:
        word = "no, the opposite"
    else:
        word = "cannot be told from chance"
    return f"{claim}: **{word}**, {_points(value)}."


def _bases(results: Results) -> Iterator[str]:
    for model in (BASE, LARGE):
        accuracy = estimate(results.of(model), over_splits=True, draws=results.draws)
        if accuracy:
            yield f"`{model}` finds {_percent(accuracy)} of the objects."
    if (difference := gain(results, LARGE, BASE)) is not None:
        yield f"The large base differs from the small one by {_points(difference)}."


def _kinds(results: Results) -> Iterator[str]:
    rows = results.of(BASE)
    kinds = rows.groupby("prompt_kind")["success"].agg(["mean", "size"])
    kinds = kinds[kinds["size"] >= MIN_GROUP].sort_values("mean")
    if len(kinds) > 1:
        hard, easy = kinds.index[0], kinds.index[-1]
        yield (
            f"`{BASE}` does best on the kind {easy} ({100 * kinds['mean'].iloc[-1]:.0f} %) and "
            f"worst on the kind {hard} ({100 * kinds['mean'].iloc[0]:.0f} %)."
        )
    elif len(rows):
        yield "The data does not state the kind of a prompt, or has too few samples of each kind."


def _causes(results: Results) -> Iterator[str]:
    for model in (BASE, LARGE):
        causes = results.majority_causes(model)
        if causes.empty:
            continue
        shares = cause_shares(causes, results.draws)
        first = max(shares, key=lambda cause: shares[cause].mean)
        yield (
            f"The most frequent cause of the {len(causes):,} judged failures of `{model}` is "
            f"{first}: {_percent(shares[first])}."
        )


def _curation(results: Results) -> Iterator[str]:
    for stage, what in (("trace", "traces"), ("amodal-trace-train", "amodal traces")):
        found = outcomes(results.roots[0], stage)
        if found is None:
            continue
        lost = found.dropped | ({"failed": found.failed} if found.failed else {})
        total = found.kept + sum(lost.values())
        if not total:
            continue
        sentence = f"Of {total:,} {what}, {decimal_text(100 * found.kept / total)} % are kept"
        if lost:
            sentence += f"; the most frequent reason for dropping one is {max(lost, key=lost.get)}"
        yield f"{sentence}."


def _logged(results: Results, stage: str, column: str) -> Iterator[tuple[str, float, float, int]]:
    """(task, mean of the first tenth, mean of the last tenth, steps) of the first seed's logs."""
    for task in ("vanilla", "amodal"):
        path = results.roots[0] / "logs" / f"{stage}-{task}.jsonl"
        rows = [
            row
            for row in (read_jsonl(path) if path.is_file() else ())
            if isinstance(row.get("step"), int) and isinstance(row.get(column), int | float)
        ]
        if rows:
            tenth = max(1, len(rows) // 10)
            values = [row[column] for row in rows]
            first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
            yield task, first, last, rows[-1]["step"]


def _sft(results: Results) -> Iterator[str]:
    for task, first, last, steps in _logged(results, "sft", "loss"):
        yield (
            f"Over {steps:,} steps the {task} loss goes from {first:.2f} to {last:.2f} "
            "(means of the first and the last tenth)."
        )


def _selection(results: Results) -> Iterator[str]:
    path = results.roots[0] / "selection.json"
    counts = (read_json(path, shape=dict) or {}).get("vanilla") or {}
    needed = ("pool", "learnable", "kept")
    if counts and not (
        isinstance(counts, dict) and all(isinstance(counts.get(name), int) for name in needed)
    ):
        raise InputError(
            f"{path}: 'vanilla' lacks the counts {', '.join(needed)}; delete it and run notebook "
            "05 again"
        )
    if counts and counts["pool"]:
        share = 100 * counts["learnable"] / counts["pool"]
        yield (
            f"Of {counts['pool']:,} prompts, {counts['learnable']:,} ({share:.0f} %) are "
            f"learnable: the reference solves them and the learner does not. GRPO trains on "
            f"{counts['kept']:,} prompts."
        )


def _grpo(results: Results) -> Iterator[str]:
    for task, first, last, steps in _logged(results, "grpo", "reward"):
        yield (
            f"Over {steps:,} steps the mean {task} reward goes from {first:.3f} to {last:.3f} "
            "(means of the first and the last tenth)."
        )
    for task, first, last, _ in _logged(results, "grpo", "eval_reward"):
        yield f"On held-out {task} prompts it goes from {first:.3f} to {last:.3f}."
    for task, _, last, _ in _logged(results, "grpo", "frac_reward_zero_std"):
        yield (
            f"In the last tenth, {100 * last:.0f} % of the {task} groups have equal rewards and "
            "teach nothing."
        )


def _latency(results: Results) -> Iterator[str]:
    for model in (BASE, LARGE, EGM, HUGE):
        if stats := latency_stats(results, model):
            tokens = "" if stats["tokens"] is None else f" for {stats['tokens']:.0f} tokens"
            yield f"`{model}` takes {stats['mean']:.0f} ms{tokens}."


def _answers(results: Results, task: str) -> Iterator[str]:
    for model, other, claim in QUESTIONS:
        if (difference := gain(results, model, other, task)) is not None:
            yield f"- {_verdict(difference, claim)}\n"


def _did_it_help(results: Results) -> Iterator[str]:
    for task in ("vanilla", "amodal"):
        answers = list(_answers(results, task))
        if answers:
            yield f"\n\n**{task.capitalize()} grounding**\n\n" + "".join(answers)


TOPICS: dict[str, Callable[[Results], Iterator[str]]] = {
    "bases": _bases,
    "kinds": _kinds,
    "causes": _causes,
    "curation": _curation,
    "sft": _sft,
    "selection": _selection,
    "grpo": _grpo,
    "latency": _latency,
    "did it help": _did_it_help,
}
