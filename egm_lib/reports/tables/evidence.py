"""Tables of the registered experiment (docs/protocol.md): hypotheses, samples, validation."""

from collections.abc import Mapping

import pandas as pd

from egm_lib.evaluation.hypotheses import MARGIN, Finding, findings
from egm_lib.evaluation.results import Results
from egm_lib.evaluation.statistics import estimate
from egm_lib.mini.language import WAYS, way_of
from egm_lib.parsing import split_reasoning
from egm_lib.prompts import TASKS
from egm_lib.reports.tables.cells import Cell, Number, Row, Table, count, p_text, percent

PAIR = {"varied": "mini-full", "uniform": "mini-uniform"}  # profiles, by their teacher


def teacher_of(results: Results) -> str:
    """ "varied" where the manifests declare several ways of reasoning for the teacher, else
    "uniform".
    """
    declared = []
    for manifest in results.manifests:
        value = manifest
        for key in ("values", "curation", "teacher", "extra_body", "ways"):
            value = value.get(key) or {}
        declared.append(value)
    varied = [0 < ways.get("worked", 0) < 1 for ways in declared]
    return "varied" if varied and all(varied) else "uniform"


def by_teacher(results: Results) -> dict[str, Results]:
    """The runs of the experiment by their teacher: these, and those of the other profile beside
    them. Empty for a profile that is not part of the experiment, or whose teacher is another.
    """
    if PAIR.get(teacher_of(results)) != results.profile:
        return {}
    found = {}
    for teacher, profile in PAIR.items():
        roots = [
            root.with_name(f"{profile}-{root.name.rpartition('-')[2]}") for root in results.roots
        ]
        if any(root.is_dir() for root in roots):
            found[teacher] = Results(roots, results.rule, results.draws)
    return found


def answered(results: Results) -> list[Finding]:
    """Every hypothesis with its answer; empty if the profile is not part of the experiment."""
    runs = by_teacher(results)
    return findings(runs, draws=results.draws) if runs else []


def table_hypotheses(results: Results) -> Table:
    """The hypotheses of docs/protocol.md, each with its difference and its status."""
    columns = ["claim", "difference", "n", "p (Holm)", "answer"]
    table = Table("hypotheses", "The registered hypotheses", columns)
    for found in answered(results):
        of = found.hypothesis
        label = f"{of.name} {of.says}: {of.model} {of.claim} than {of.other}, {of.task}"
        if of.claim != "better":
            label = f"{of.name} {of.says}: {of.model}, {of.other}, {of.task}"
        status = f"{found.status}, by less than the margin" if found.small else found.status
        n = None if found.difference is None else count(found.difference.n)
        by_interval = found.difference is not None and of.claim != "better"
        p = "" if by_interval else p_text(found.p_value)
        cells = [of.claim, percent(found.difference), n, p, status]
        table.rows.append(Row(label, f"teacher: {of.teacher}", cells))
    table.notes.append(
        "Points of accuracy at IoU > 0.5, paired on samples and seeds, mean over the splits; 95 % "
        'intervals over images and seeds. H1 is tested alone; the other claims of "better" are '
        "corrected together. Claims without p are read from the interval. Margin: "
        f"{100 * MARGIN:g} points. H4 compares two differences."
    )
    return table


def table_samples(results: Results) -> Table:
    """Greedy and sampled accuracy, pass@N, and in which way a model reasons: does reward choose a
    way, or create an ability?
    """
    ways = [f"{way}, {kind}" for kind in ("greedy", "sampled") for way in WAYS]
    columns = ["greedy", "sampled", "pass@N", "N", *(f"{name}, %" for name in ways)]
    table = Table("table4_samples", "Greedy answers and samples", columns)
    for task in TASKS:
        for model in results.models:
            samples = samples_of(results, model, task)
            if not samples.empty:
                table.rows.append(
                    Row(f"{model}, {task}", "ours", _cells(results, model, task, samples))
                )
    table.notes.append(
        "Samples: temperature 1 without top-k and top-p. sampled: mean over the N samples. pass@N: "
        "at least one of the N is right. Ways of reasoning are shares of the answers to prompts "
        "that need several steps. worked: the steps are written out; concluding: only the place of "
        "the object is named; restating: no place is named."
    )
    return table


def table_ways(results: Results) -> Table:
    """Is a way of reasoning more often right after GRPO, or only more frequent? Of the registered
    experiment alone: ways are told by the miniature's language.
    """
    columns = [name for way in WAYS for name in (f"{way}, %", f"right where {way}", f"n, {way}")]
    table = Table("table4_ways", "Greedy answers by way of reasoning", columns)
    models = results.models if results.profile in PAIR.values() else []
    for task in TASKS:
        for model in models:
            told = ways_told(results.of(model, task))
            if set(told["way"]) <= {None}:
                continue
            cells = []
            for way in WAYS:
                rows = told[told["way"] == way]
                right = percent(estimate(rows, draws=results.draws)) if len(rows) else ""
                cells += [Number(100 * len(rows) / len(told)), right, count(len(rows))]
            table.rows.append(Row(f"{model}, {task}", "ours", cells))
    table.notes.append(
        "In percent of the prompts that need several steps. right: accuracy at IoU > 0.5 over all "
        "of them, not the mean over the splits. Each model chooses which prompts it works out, so "
        "models are not compared on the same prompts."
    )
    return table


def table_validation(results: Results) -> Table:
    """Accuracy on the validation split: greedy, and sampled at temperature 1."""
    columns = ["greedy", "n", "sampled", "n, sampled"]
    table = Table("table4_validation", "Accuracy on the validation split", columns)
    found = results.validation
    by_model = dict(list(found.groupby(found["model"].str.split("@").str[0], sort=False)))
    order = {model: place for place, model in enumerate(results.models)}
    for model in sorted(by_model, key=lambda name: (order.get(name, len(order)), name)):
        names = by_model[model]["model"]
        is_sample = names.str.startswith(f"{model}@sample-")
        parts = (by_model[model][names == model], by_model[model][is_sample])
        cells = [
            cell
            for rows in parts
            for cell in (percent(estimate(rows, draws=results.draws)), count(len(rows) or None))
        ]
        table.rows.append(Row(model, "ours", cells))
    table.notes.append(
        "In percent. sampled: temperature 1 without top-k and top-p. reference: the stronger model "
        "of the selection (Sec. 4.2), which is the same for all seeds."
    )
    return table


def samples_of(results: Results, model: str, task: str) -> pd.DataFrame:
    """All sampled answers of a model (`predict --model MODEL@sample-N`); no rows where none are."""
    names = [name for name in results.variants if name.startswith(f"{model}@sample-")]
    parts = [results.of(name, task) for name in names]
    return pd.concat(parts) if parts else results.of(f"{model}@sample-0", task)


def _cells(results: Results, model: str, task: str, samples: pd.DataFrame) -> list[Cell]:
    greedy = results.of(model, task)
    solved = samples.groupby(["seed", "sample_id"], sort=False).agg(
        {"success": "any", "image_id": "first", "dataset": "first", "split": "first"}
    )
    options = {"over_splits": True, "draws": results.draws}
    accuracy = [
        percent(estimate(rows, **options)) for rows in (greedy, samples, solved.reset_index())
    ]
    shares = [way_shares(rows) for rows in (greedy, samples)]
    ways = [Number(100 * share[way]) if share else None for share in shares for way in WAYS]
    return [*accuracy, count(samples["model"].nunique()), *ways]


def way_shares(scored: pd.DataFrame) -> Mapping[str, float] | None:
    """The share of each way of reasoning among answers to prompts that need steps; None without."""
    told = ways_told(scored)["way"]
    return None if told.empty else {way: (told == way).mean() for way in WAYS}


def ways_told(scored: pd.DataFrame) -> pd.DataFrame:
    """The answers to prompts that need steps, each with its way of reasoning ("way")."""
    rows = scored[(scored["prompt_kind"] != "plain") & scored["raw_answer"].notna()]
    told = [
        way_of(split_reasoning(raw_answer)[0], expression)
        for raw_answer, expression in zip(rows["raw_answer"], rows["expression"], strict=True)
    ]
    return rows.assign(way=told)
