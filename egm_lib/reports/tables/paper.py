"""Tables 1-12 of the paper, our numbers beside the published ones."""

from collections.abc import Sequence
from dataclasses import fields

import pandas as pd

from egm_lib.curation.judges import agreement
from egm_lib.data.records import AMODAL_SPLITS, EVAL_SPLITS
from egm_lib.evaluation.results import Results, paper, paper_mean
from egm_lib.evaluation.scoring import split_keys
from egm_lib.evaluation.statistics import Difference, Estimate, estimate, paired_difference
from egm_lib.files import read_json
from egm_lib.profile import ProfileError, Sampling, load_profile
from egm_lib.reports.curated import outcomes, trace_counts
from egm_lib.reports.tables.cells import (
    NOT_REPORTED,
    NOT_RUN,
    Cell,
    Number,
    Row,
    Table,
    count,
    decimal_text,
    percent,
    published,
)


def cause_shares(failures: pd.DataFrame, draws: int) -> dict[str, Estimate]:
    """The share of each of the paper's causes among failures with a majority cause."""
    causes = [row["name"] for row in paper("table12")["rows"]]
    seeds = failures.assign(dataset="", split="")
    return {
        cause: estimate(
            seeds.assign(hit=(seeds["cause"] == cause).astype(float)), "hit", draws=draws
        )
        for cause in causes
    }


def counted_failures(number: int, seeds: int) -> str:
    """How many failures a share refers to, and of how many seeds their sum is.

    (A base fails on the same samples in every seed.)
    """
    return f"{number:,} failures" + (f" summed over {seeds} seeds" if seeds > 1 else "")


def table1(results: Results) -> Table:
    """Causes of failure: the paper's, then the run's bases by the majority of their judges."""
    models = [
        model
        for model in results.models
        if not results.failures[results.failures["model"] == model].empty
    ]
    shown = list(dict.fromkeys(["small-base", "large-base", *models]))
    source = paper("table1")
    table = Table("table1", source["title"], ["InternVL-3-8B, GPT-4", *shown])
    shares = {}
    for model in shown:
        majority = results.majority_causes(model)
        shares[model] = None if majority.empty else cause_shares(majority, results.draws)
    for row in source["rows"]:
        cells = [
            None if shares[model] is None else percent(shares[model][row["name"]])
            for model in shown
        ]
        table.rows.append(Row(row["name"], "paper | ours", [published(row["values"][0]), *cells]))
    for model in shown:
        judged = results.majority_causes(model)
        if not judged.empty:
            open_share = (judged["cause"] == "no majority").mean()
            table.notes.append(
                f"{model}: {counted_failures(len(judged), judged['seed'].nunique())}; for "
                f"{decimal_text(100 * open_share)} % no cause has a majority of the judges."
            )
    table.notes.append(
        f"Paper: {source['source']}. Ours: the cause that most judges "
        f"({', '.join(results.judges) or NOT_RUN}) name."
    )
    return table


def table2(results: Results) -> Table:
    """Accuracy on the failures of the small base that the judges call COMPLEX-PROMPT."""
    source = paper("table2")
    table = Table("table2", source["title"], ["accuracy", "n"])
    table.rows += [
        Row(row["name"], "paper", [published(row["values"][0]), NOT_REPORTED])
        for row in source["rows"]
    ]
    complex_ids = results.majority_causes("small-base").query("cause == 'COMPLEX-PROMPT'")[
        ["seed", "sample_id"]
    ]
    for model in results.models or ["small-egm", "large-base"]:
        if model != "small-base":
            rows = (
                results.of(model).merge(complex_ids, on=["seed", "sample_id"])
                if len(results.models)
                else pd.DataFrame()
            )
            value = None if rows.empty else estimate(rows, draws=results.draws)
            table.rows.append(Row(model, "ours", [percent(value), value and count(value.n)]))
    table.notes.append(
        "These samples were chosen because the small base fails on them. So a model that resembles "
        "the small base starts lower than an unrelated model."
    )
    return table


def table12(results: Results) -> Table:
    """The causes of the small base's failures, judge by judge, and how far the judges agree."""
    source = paper("table12")
    failures = results.failures[results.failures["model"] == "small-base"]
    judges = results.judges or ["our judges"]
    table = Table(
        "table12",
        source["title"],
        [*(f"paper: {name}" for name in source["columns"]), *(f"ours: {name}" for name in judges)],
    )
    shares = {}
    for judge in judges:
        rows = failures[failures["judge"] == judge]
        shares[judge] = None if rows.empty else cause_shares(rows, results.draws)
    for row in source["rows"]:
        ours = [
            None if shares[judge] is None else percent(shares[judge][row["name"]])
            for judge in judges
        ]
        table.rows.append(Row(row["name"], "paper | ours", [*map(published, row["values"]), *ours]))
    table.notes += [
        f"Agreement of our judges: {_agreement(failures)}.",
        f"Paper: {source['source']}.",
    ]
    return table


def _agreement(failures: pd.DataFrame) -> str:
    if failures["judge"].nunique() < 2:
        return NOT_RUN
    apart = failures.assign(sample_id=failures["seed"].astype(str) + ":" + failures["sample_id"])
    images = dict(zip(apart["sample_id"], apart["image_id"], strict=True))
    table = agreement(apart, images)
    if "all" not in table.index:
        return "no failure was judged by all"
    everyone = table.loc["all"]
    judged = counted_failures(int(everyone["n"]), failures["seed"].nunique())
    return (
        f"{decimal_text(everyone['percent'])} % unanimous, Fleiss' kappa {everyone['kappa']:.2f} "
        f"[{everyone['low']:.2f}, {everyone['high']:.2f}], {judged}"
    )


# What is dropped on the way to the SFT data: the stage of the run's curation, by column of Table 3.
# The paper does not report these shares.
DROPPED = {
    "expressions dropped by filters, %": ("", "amodal-expression-train"),
    "expressions not verified, %": ("", "verify-train"),
    "traces dropped by filters, %": ("trace", "amodal-trace-train"),
}


def table3(results: Results) -> Table:
    """Counts of the SFT data, and what the filters dropped on the way to it."""
    source = paper("table3")
    tasks = source["columns"]
    table = Table("table3", source["title"], tasks)
    table.rows += [
        Row(row["name"], "paper", [count(value) for value in row["values"]])
        for row in source["rows"]
    ]
    counted = [_count_traces(results, task) for task in tasks]
    for label in ("samples", "images", "words a trace, mean"):
        table.rows.append(Row(label, "ours", [counts and counts[label] for counts in counted]))
    for label, stages in DROPPED.items():
        table.rows.append(Row(label, "paper", [NOT_REPORTED if stage else "" for stage in stages]))
        table.rows.append(
            Row(label, "ours", [_dropped(results, stage) if stage else "" for stage in stages])
        )
    table.notes += _first_seed_note(results)
    return table


def _first_seed_note(results: Results) -> list[str]:
    """The note below counts of data: they are those of one seed, and the others hardly differ."""
    return [f"Ours: seed {results.seeds[0]}."] if len(results.seeds) > 1 else []


def _dropped(results: Results, stage: str) -> Cell:
    """Share of a curation stage's answers that its filters dropped, in the first seed."""
    found = outcomes(results.roots[0], stage)
    if found is None or not found.answered:
        return None
    return Number(100 * sum(found.dropped.values()) / found.answered, n=found.answered)


def _count_traces(results: Results, task: str) -> dict[str, Cell] | None:
    """Table 3's counts of the samples with traces of a task, None if there are none."""
    counts = trace_counts(results.roots[0], task)
    if counts is None:
        return None
    return {
        "samples": count(counts.samples),
        "images": count(counts.images),
        "words a trace, mean": Number(counts.words / counts.samples),
    }


def _flat(values: dict, prefix: str = "") -> list[tuple[str, Cell]]:
    """Numbers and short texts of nested statistics, one a row."""
    rows: list[tuple[str, Cell]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{name}: ")
        elif isinstance(value, bool | str):
            rows.append((name, str(value)))
        elif isinstance(value, int):
            rows.append((name, Number(value, decimals=0)))
        elif isinstance(value, float):
            rows.append((name, Number(value, decimals=3)))
    return rows


SELECTED = {  # the counts of selection.json in words
    "both": "both solve it",
    "learnable": "learnable: the reference alone solves it",
    "learner_only": "only the learner solves it",
    "neither": "neither solves it",
    "easy": "easy: drawn from those that the learner solves",
    "filled": "added to reach a set size",
}


def table7(results: Results) -> Table:
    """Sizes of the RL data, and what our selection found in the first seed."""
    source = paper("table7")
    table = Table("table7", source["title"], ["samples"])
    table.rows += [
        Row(row["name"], "paper", [count(value) for value in row["values"]])
        for row in source["rows"]
    ]
    stats = read_json(results.roots[0] / "selection.json", shape=dict)
    for name, value in _flat(stats) if stats else [("small", None)]:
        task, _, counted = name.rpartition(": ")
        label = f"{task}: {SELECTED.get(counted, counted)}" if task else name
        table.rows.append(Row(label, "ours", [value]))
    table.notes += [f"Paper: {source['source']}.", *_first_seed_note(results)]
    return table


def table6(results: Results) -> Table:
    """GRPO's hyperparameters: the paper's, and those that the run began with."""
    trained = [root for root in results.roots if (root / "logs" / "grpo-vanilla.jsonl").is_file()]
    manifests = [read_json(root / "manifest.json", shape=dict) or {} for root in trained]
    stated = [manifest.get("values") for manifest in manifests]
    ours = [values.get("grpo") for values in stated if isinstance(values, dict)]
    ours = [values for values in ours if isinstance(values, dict)]
    table = _settings("table6", ours)
    limits = [str(values["max_steps"]) for values in ours if values.get("max_steps")]
    if limits:
        cells = [*[NOT_REPORTED] * 2, " / ".join(dict.fromkeys(limits))]
        table.rows.insert(1, Row("steps, where they end it earlier", "paper | ours", cells))
    return table


def table8(results: Results) -> Table:
    """Decoding in evaluation: the paper's and the profile's."""
    try:
        sampling = load_profile(results.profile).generation.sampling
    except ProfileError:
        return _settings("table8", [])
    return _settings(
        "table8", [{item.name: getattr(sampling, item.name) for item in fields(Sampling)}]
    )


def _settings(name: str, ours: Sequence[dict]) -> Table:
    source = paper(name)
    table = Table(
        name, source["title"], [*(f"paper: {column}" for column in source["columns"]), "ours"]
    )
    for row in source["rows"]:
        stated = [_setting(values[row["key"]]) for values in ours if row["key"] in values]
        cells = [*map(_setting, row["values"]), " / ".join(dict.fromkeys(stated)) or NOT_RUN]
        table.rows.append(Row(row["name"], "paper | ours", cells))
    table.notes.append(f"Paper: {source['source']}.")
    return table


def _setting(value) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def accuracy_cells(results: Results, model: str, task: str = "vanilla") -> list[Cell]:
    """Accuracy of a model on each split of a task; last, their mean where all were run."""
    splits = EVAL_SPLITS if task == "vanilla" else AMODAL_SPLITS
    rows = results.of(model, task)
    keys = split_keys(rows)
    wanted = [f"{dataset}_{split}" for dataset, split in splits]
    cells = [percent(estimate(rows[keys == key], draws=results.draws)) for key in wanted]
    rows = rows[keys.isin(wanted)]
    complete = all(cell is not None for cell in cells)
    return [
        *cells,
        percent(estimate(rows, over_splits=True, draws=results.draws)) if complete else None,
    ]


def gain(results: Results, a: str, b: str, task: str = "vanilla") -> Difference | None:
    """Model a minus model b over the splits of a task."""
    rows_a, rows_b = results.of(a, task), results.of(b, task)
    if rows_a.empty or rows_b.empty:
        return None
    return paired_difference(rows_a, rows_b, over_splits=True, draws=results.draws)


def _by_split(results: Results, name: str, models: Sequence[str]) -> Table:
    source = paper(name)
    table = Table(name, source["title"], [*source["columns"], "mean of 8", "n"])
    published_rows = {row["name"]: row for row in source["rows"]}
    listed = []
    for model in models:
        beside = published_rows.get(results.paper_models.get(model))
        if beside is not None:
            table.rows.append(_published_row(beside))
            listed.append(beside["name"])
        ours = accuracy_cells(results, model)
        table.rows.append(Row(model, "ours", [*ours, count(len(results.of(model)) or None)]))
        if beside is not None and results.same_models:
            values = [*beside["values"], paper_mean(beside)]
            off = [_minus(cell, value) for cell, value in zip(ours, values, strict=True)]
            table.rows.append(Row(model, "ours - paper", [*off, None]))
        if model == "small-egm":
            base = published_rows.get(results.paper_models["small-base"])
            if base is not None and beside is not None:
                table.rows.append(_published_gain(beside, base))
            table.rows.append(_split_gains(results, model, "small-base"))
    table.rows += [_published_row(row) for row in source["rows"] if row["name"] not in listed]
    table.notes.append(
        f"Accuracy at IoU > 0.5, percent; rule: {results.rule}. Paper: "
        f"{source['source']}.{miniature(results)}"
    )
    return table


def miniature(results: Results) -> str:
    """The warning below a table whose models are not the paper's."""
    if results.same_models:
        return ""
    return " Our models are miniatures: compare the direction of differences, not the numbers."


def _published_row(row: dict) -> Row:
    return Row(
        row["name"],
        "paper",
        [*map(published, row["values"]), published(paper_mean(row)), NOT_REPORTED],
    )


def _published_gain(above: dict, below: dict) -> Row:
    values = [x - y for x, y in zip(above["values"], below["values"], strict=True)]
    values.append(paper_mean(above) - paper_mean(below))
    gains = [Number(value, signed=True) for value in values]
    return Row(f"{above['name']} - {below['name']}", "paper, gain", [*gains, NOT_REPORTED])


def _split_gains(results: Results, a: str, b: str) -> Row:
    rows_a, rows_b = results.of(a), results.of(b)
    cells: list[Cell] = []
    for dataset, split in EVAL_SPLITS:
        parts = [
            rows[(rows["dataset"] == dataset) & (rows["split"] == split)]
            for rows in (rows_a, rows_b)
        ]
        empty = any(part.empty for part in parts)
        cells.append(None if empty else percent(paired_difference(*parts, draws=results.draws)))
    mean = None if None in cells else gain(results, a, b)
    return Row(f"{a} - {b}", "ours, gain", [*cells, percent(mean), mean and count(mean.n)])


def _minus(cell: Cell, value: float) -> Cell:
    if not isinstance(cell, Number):
        return None
    ci95 = None if cell.ci95 is None else (cell.ci95[0] - value, cell.ci95[1] - value)
    return Number(cell.value - value, ci95, cell.n, signed=True)


def table4(results: Results) -> Table:
    """Accuracy by split, the paper's model above ours."""
    wanted = ["small-base", "small-egm", "large-base"]
    others = [
        model
        for model in results.models
        if model not in wanted and model != "small-egm-no-reasoning"
    ]
    return _by_split(results, "table4", [*wanted, *others])


def table10(results: Results) -> Table:
    """The same with the reasoning switched off."""
    return _by_split(results, "table10", ["small-base", "small-egm-no-reasoning", "small-egm"])


def table5(results: Results) -> Table:
    """Amodal grounding."""
    source = paper("table5")
    table = Table(
        "table5",
        source["title"],
        ["COCO-Amodal val", "COCO-Amodal test", "mean of 2", "gain over small-base", "n"],
    )
    for row in source["rows"]:
        cells = [
            NOT_REPORTED,
            NOT_REPORTED,
            NOT_REPORTED,
            Number(row["values"][0], signed=True),
            NOT_REPORTED,
        ]
        table.rows.append(Row(row["name"], "paper", cells))
    for model in dict.fromkeys(
        ["small-base", "small-sft", "small-egm", "large-base", *results.models]
    ):
        cells = accuracy_cells(results, model, "amodal")
        lift = (
            "" if model == "small-base" else percent(gain(results, model, "small-base", "amodal"))
        )
        table.rows.append(
            Row(model, "ours", [*cells, lift, count(len(results.of(model, "amodal")) or None)])
        )
    table.notes.append(f"Paper: {source['source']}.{miniature(results)}")
    return table


def table9(results: Results) -> Table:
    """What SFT gives and what RL adds."""
    source = paper("table9")
    table = Table(
        "table9", source["title"], [*source["columns"], "SFT - base", "RL - SFT", "RL - base"]
    )
    for row in source["rows"]:
        base, sft, rl = row["values"]
        cells = [
            published(base),
            published(sft),
            published(rl),
            NOT_REPORTED,
            NOT_REPORTED,
            Number(rl - base, signed=True),
        ]
        table.rows.append(Row(row["name"], "paper", cells))
    chain = ("small-base", "small-sft", "small-egm")
    for task in ("vanilla", "amodal"):
        means = [accuracy_cells(results, model, task)[-1] for model in chain]
        pairs = [(chain[1], chain[0]), (chain[2], chain[1]), (chain[2], chain[0])]
        gains = [percent(gain(results, a, b, task)) for a, b in pairs]
        table.rows.append(Row(f"small, {task}", "ours", [*means, *gains]))
    table.notes.append(f"Paper: {source['source']}.{miniature(results)}")
    return table


def table11(results: Results) -> Table:
    """How many of the small base's failures another model solves, and what it loses."""
    source = paper("table11")
    table = Table("table11", source["title"], [*source["columns"], "lost of what the base solved"])
    for row in source["rows"]:
        failed, solved, share = row["values"]
        table.rows.append(
            Row(row["name"], "paper", [count(failed), count(solved), Number(share), NOT_REPORTED])
        )
    base = results.of("small-base")
    models = [model for model in results.models if model != "small-base"] or ["small-egm"]
    for model in models:
        rows = results.of(model)
        if base.empty or rows.empty:
            table.rows.append(Row(model, "ours", [None] * 4))
            continue
        both = rows.merge(
            base[["seed", "sample_id", "success"]], on=["seed", "sample_id"], suffixes=("", "_base")
        )
        failed, kept = both[~both["success_base"]], both[both["success_base"]]
        solved = estimate(failed, draws=results.draws)
        dropped = estimate(kept.assign(success=~kept["success"]), draws=results.draws)
        table.rows.append(
            Row(
                model,
                "ours",
                [
                    count(len(failed)),
                    count(int(failed["success"].sum())),
                    percent(solved),
                    percent(dropped),
                ],
            )
        )
    table.notes.append(
        "Any model that differs from the base solves some of the base's failures. The last column "
        "shows the share of the base's successes that it loses; the paper does not report it."
    )
    return table
