"""The curation of one run: whom a task asks, where its files are, and what all of it may cost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from egm_lib.curation.client import estimate, run_task
from egm_lib.curation.cost import CostEstimate
from egm_lib.curation.judges import write_judgements
from egm_lib.curation.options import CurationError
from egm_lib.curation.outputs import kept, read_output
from egm_lib.curation.request_plan import Report
from egm_lib.curation.tasks import TASKS
from egm_lib.data import eval_splits, read_eval, read_train
from egm_lib.files import iter_jsonl
from egm_lib.profile import Teacher, is_local
from egm_lib.run import Run

BUDGET_VARIABLE = "EGM_BUDGET_USD"  # set for one run, it replaces the profile's budget_usd
# Share of the evaluation samples that a base misses, for the estimate before it has answered: the
# paper's small bases have accuracies of about 0.85 to 0.9 (Table 4).
FAILURE_SHARE = 0.15
# The tasks whose answers a task's samples hold, and as which field (notebook 03)
BEFORE = {
    "verify": (("amodal-expression", "expression"),),
    "amodal-trace": (("amodal-expression", "expression"), ("verify", "verdict")),
}
JUDGED = ("small-base", "large-base")


def run_stage(run: Run, task_name: str, samples: Iterable[Mapping], stage: str = "") -> Report:
    """Ask the profile's teacher about the samples of a stage, within the profile's budget.

    stage: names the output, `curation/<task>-<stage>.jsonl` in the run's folder ("": without it).
    The stages of a task share one ledger. Returns the report; its `out` is the output file.
    Raises CurationError for a paid service without a budget and where some samples were not asked
    (the answers are kept, and the same call continues), and whatever `run_task` raises.
    """
    name = f"{task_name}-{stage}" if stage else task_name
    return _ask(run, task_name, samples, run.profile.curation.teacher, name)


def judge_failures(run: Run, model: str, failures: Iterable[Mapping]) -> int:
    """Ask every judge of the profile why a model failed; returns the number of judgements.

    failures: prediction rows. Writes `failures/<model>.jsonl` in the run's folder.
    Raises as `run_stage` does.
    """
    outs = {}
    for file, judge in run.profile.curation.judge_files().items():
        name = f"failure-{model}-{file}"
        report = _ask(run, "failure", failures, judge, name, filtered=False)
        outs[judge.model] = report.out
    return write_judgements(_judgements(run, model), outs)


def _ask(
    run: Run,
    task_name: str,
    samples: Iterable[Mapping],
    service: Teacher,
    name: str,
    *,
    filtered: bool = True,
) -> Report:
    curation, ledger = run.profile.curation, _ledger(run, task_name)
    budget_usd = budget_of(run)
    if budget_usd is None and is_paid(service):
        raise CurationError(
            f"{service.model} at {service.base_url} costs money, and this run has no budget: set "
            f"curation.budget_usd in the profile or the environment variable {BUDGET_VARIABLE}, in "
            "USD; for a service that costs nothing, set price_per_mtok to 0 and 0"
        )
    if not is_paid(service):
        budget_usd = None
    if budget_usd is not None:  # it is for all tasks together; `run_task` knows one ledger
        budget_usd = max(0.0, budget_usd - _spent_usd(run, besides=ledger))
    report = run_task(
        TASKS[task_name],
        samples,
        service,
        out=_output(run, name),
        ledger=ledger,
        root=run.profile.data.path,
        limit=curation.limit,
        budget_usd=budget_usd,
        skip_filters=curation.skip_filters if filtered else (),
        progress=False,
    )
    if report.stopped or report.waiting:  # no later stage may take it for finished
        reason = report.stopped or "stopped; the same command continues"
        raise CurationError(f"{name}: {report.waiting:,} samples are not asked yet: {reason}")
    return report


def is_paid(service: Teacher) -> bool:
    """Whether a service may cost money: it is not on this machine, and its price is not zero."""
    price = service.price_per_mtok
    free = price is not None and price.prompt == price.completion == 0
    return not free and not is_local(service.base_url)


def budget_of(run: Run) -> float | None:
    """US dollars for the whole curation of a run; None if neither environment nor profile say.

    Raises CurationError if the environment variable holds no amount.
    """
    text = os.environ.get(BUDGET_VARIABLE, "")
    if not text:
        return run.profile.curation.budget_usd
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not amount >= 0:
        raise CurationError(f"{BUDGET_VARIABLE} is {text!r}: give an amount in USD, such as 50")
    return amount


@dataclass(frozen=True)
class StageEstimate:
    """A task's requests to one service. cost: None if its samples are not on the disk yet."""

    task: str
    stage: str
    model: str
    cost: CostEstimate | None


@dataclass(frozen=True)
class RunEstimate:
    """What the paid services of a run would cost; without such services there are no stages."""

    stages: tuple[StageEstimate, ...]

    @property
    def cost_usd(self) -> float:
        return sum(stage.cost.cost_usd for stage in self.stages if stage.cost)

    @property
    def at_most_usd(self) -> float:
        return sum(stage.cost.at_most_usd for stage in self.stages if stage.cost)

    @property
    def complete(self) -> bool:
        """Whether every stage has samples and a price, so that the sums leave nothing out."""
        return all(stage.cost is not None and stage.cost.price for stage in self.stages)

    def __str__(self) -> str:
        if not self.stages:
            return "no paid service is asked"
        lines = [
            f"{stage.task} {stage.stage} by {stage.model}: "
            + (str(stage.cost) if stage.cost else "unknown, its samples are not prepared yet")
            for stage in self.stages
        ]
        missing = "" if self.complete else ", without the stages whose cost is unknown"
        total = f"about {self.cost_usd:,.2f} USD, at most {self.at_most_usd:,.2f} USD{missing}"
        return "\n".join([*lines, f"all together: {total}"])


def estimate_run(run: Run) -> RunEstimate:
    """What all curation tasks of a run would still ask of paid services, and cost; asks nothing.

    Answers that a ledger holds cost nothing more. Before they have judged, the judges are counted
    on FAILURE_SHARE of the evaluation samples (at most: on all). Before the steps before it are
    done, a step counts every amodal sample as accepted by them.
    """
    return RunEstimate(tuple(_stage_estimates(run)))


def _stage_estimates(run: Run) -> Iterator[StageEstimate]:
    curation, data, tasks = run.profile.curation, run.profile.data, run.profile.tasks
    asked: list[tuple[str, str, int | None]] = []  # (task, stage, limit of its samples)
    if "vanilla" in tasks:
        asked.append(("trace", "train", data.train_limit))
    if "amodal" in tasks:
        amodal = (("train", data.train_amodal_limit), ("selection", data.selection_amodal_limit))
        asked += [(name, *pair) for name in ("amodal-expression", "verify") for pair in amodal]
        asked.append(("amodal-trace", "train", data.train_amodal_limit))
    if is_paid(curation.teacher):
        for name, stage, limit in asked:
            kind = "vanilla" if name == "trace" else "amodal"
            try:
                samples = _curated(run, name, stage, read_train(data.path, kind, stage, limit))
            except (OSError, ValueError):
                samples = None
            cost = samples and _estimate(run, name, samples, curation.teacher)
            yield StageEstimate(name, stage, curation.teacher.model, cost or None)
    for judge in filter(is_paid, curation.judges if "vanilla" in tasks else ()):
        try:
            samples = _as_failures(run)
        except (OSError, ValueError):
            samples = None
        for model in JUDGED:
            if _judgements(run, model).exists():
                continue  # every judge has judged all of its failures
            cost = samples and _estimate(run, "failure", samples, judge, share=FAILURE_SHARE)
            yield StageEstimate("failure", model, judge.model, cost or None)


def _curated(run: Run, name: str, stage: str, samples: Sequence[Mapping]) -> Sequence[Mapping]:
    """The samples that a task is asked about: what the tasks before it kept, once they are done."""
    for before, field in BEFORE.get(name, ()):
        out = _output(run, f"{before}-{stage}")
        if not out.exists() or sum(1 for _ in read_output(out)) < len(samples):
            break
        samples = list(kept(samples, out, field))
    return samples


def _as_failures(run: Run) -> list[dict]:
    """Every evaluation sample as the prediction row of a model without a box."""
    data = run.profile.data
    return [
        {**sample, "box": None}
        for dataset, split in eval_splits("vanilla")
        for sample in read_eval(data.path, dataset, split, data.eval_limit)
    ]


def _estimate(
    run: Run, name: str, samples: Iterable[Mapping], service: Teacher, share: float = 1.0
) -> CostEstimate:
    cost = estimate(
        TASKS[name],
        samples,
        service,
        ledger=_ledger(run, name),
        root=run.profile.data.path,
        limit=run.profile.curation.limit,
    )
    return cost if share == 1.0 else cost.of_share(share)


def _folder(run: Run) -> Path:
    return run.root / "curation"


def _output(run: Run, name: str) -> Path:
    return _folder(run) / f"{name}.jsonl"


def _judgements(run: Run, model: str) -> Path:
    return run.root / "failures" / f"{model}.jsonl"


def _ledger(run: Run, task_name: str) -> Path:
    return _folder(run) / f"{task_name}.ledger.jsonl"


def _spent_usd(run: Run, besides: Path) -> float:
    """What the run's other ledgers have cost."""
    ledgers = [path for path in _folder(run).glob("*.ledger.jsonl") if path != besides]
    costs = (row.get("cost_usd") for path in ledgers for row in iter_jsonl(path))
    return sum(cost for cost in costs if isinstance(cost, int | float))
