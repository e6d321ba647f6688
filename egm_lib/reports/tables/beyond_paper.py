"""Tables that the paper lacks: differences, kinds of samples, rules, answers, decoding, latency."""

import math

import numpy as np
from pandas import DataFrame, Series

from egm_lib.evaluation.metrics import metrics
from egm_lib.evaluation.results import Results, paper
from egm_lib.evaluation.scoring import with_strata
from egm_lib.evaluation.statistics import Difference, estimate, holm, paired_difference
from egm_lib.inference.engine import CONCURRENCIES
from egm_lib.parsing import RULES
from egm_lib.profile import PROMPTED
from egm_lib.reports.tables.cells import NOT_REPORTED, Number, Row, Table, count, p_text, percent
from egm_lib.reports.tables.paper import accuracy_cells, gain
from egm_lib.training.variants import STEPS, VARIANTS

COMPARISONS = (
    ("small-egm", "small-base"),
    ("small-egm", "large-base"),
    ("small-egm", "huge-base"),
    ("small-egm", "small-sft"),
    ("small-sft", "small-base"),
    ("small-egm", "small-egm-no-reasoning"),
    ("small-egm", "small-direct-control"),
    ("small-egm", "small-sft-control"),
    ("small-egm", "small-egm-unselected"),
    ("small-sft", "small-direct-control"),
    ("large-base", "small-base"),
)


def differences(
    results: Results,
) -> list[tuple[str, str, str, Difference | None, float | None]]:
    """(model a, model b, task, a - b, its p after Holm) of every comparison; None: not run."""
    tests = [
        (a, b, task, gain(results, a, b, task))
        for task in ("vanilla", "amodal")
        for a, b in COMPARISONS
        if b != "huge-base" or b in results.models  # few profiles have a third size
    ]
    with_p = [test for *_, test in tests if test is not None and test.p_value is not None]
    adjusted = iter(holm([test.p_value for test in with_p]))
    return [
        (
            a,
            b,
            task,
            test,
            next(adjusted) if test is not None and test.p_value is not None else None,
        )
        for a, b, task, test in tests
    ]


def table_differences(results: Results) -> Table:
    """The hypothesis and its controls: paired differences, Holm-corrected within the table."""
    table = Table(
        "table4_differences",
        "Differences, paired on samples",
        ["points", "n", "p (clustered)", "p (Holm)", "only first", "only second", "p (McNemar)"],
    )
    for a, b, task, test, adjusted_p in differences(results):
        cells = (
            [None] * 7
            if test is None
            else [
                percent(test),
                count(test.n),
                p_text(test.p_value),
                p_text(adjusted_p),
                count(test.only_a),
                count(test.only_b),
                p_text(test.mcnemar_p) or "several seeds",
            ]
        )
        table.rows.append(Row(f"{a} - {b}, {task}", "ours", cells))
    table.notes.append(
        "Mean over the splits; 95 % intervals from a bootstrap over images (and seeds). only first "
        "/ only second: samples that only one of the two solves. small-direct-control: the base, "
        "trained further on direct answers, as much as SFT and GRPO together. small-sft-control: "
        "SFT continued, as much as GRPO. docs/deviations.md, 12, says how this is measured."
    )
    return table


def table_kinds(results: Results) -> Table:
    """Accuracy by kind of prompt, number of look-alikes, size of the object, and length."""
    models = results.models
    table = Table("table4_kinds", "Accuracy by kind of sample", ["n", *models])
    if not models:
        return table
    scored = with_strata(results.scored[results.scored["task"] == "vanilla"])
    for stratum in ("prompt_kind", "num_lookalikes", "size", "length"):
        groups = scored[scored[stratum].notna()].groupby(stratum, sort=True, observed=True)
        for value, group in groups:
            name = (
                f"{stratum.replace('_', ' ')}: {value:g}"
                if isinstance(value, float)
                else f"{stratum.replace('_', ' ')}: {value}"
            )
            cells = [
                percent(estimate(group[group["model"] == model], draws=results.draws))
                for model in models
            ]
            table.rows.append(Row(name, "ours", [count(group["sample_id"].nunique()), *cells]))
    table.notes.append(
        "All vanilla splits are pooled. n: number of samples. Kinds of prompts and look-alikes are "
        "shown where the data states them."
    )
    return table


def table_rules(results: Results) -> Table:
    """The same answers scored as other evaluators would score them."""
    models = results.models
    table = Table("table4_rules", "The same answers under other evaluators' rules", models)
    for rule in RULES if models else ():
        scored = results.scored if rule == results.rule else results.score(rule)
        cells = []
        for model in models:
            rows = scored[(scored["model"] == model) & (scored["task"] == "vanilla")]
            cells.append(percent(estimate(rows, over_splits=True, draws=results.draws)))
        table.rows.append(Row(rule, "ours", cells))
    table.notes.append(
        "Plain mean over the vanilla splits that were run. Rules: docs/scoring-rules.md."
    )
    return table


def table_answers(results: Results) -> Table:
    """What kind of answers a model gives: shares in percent, and tokens."""
    shares = {
        "acc_50_95": "accuracy, IoU 0.50 to 0.95",
        "mean_iou": "mean IoU",
        "no_box": "no box",
        "several_boxes": "several boxes",
        "unclosed_reasoning": "unclosed reasoning",
        "malformed": "malformed",
        "error": "error",
        "truncated": "truncated",
    }
    tokens = {"reasoning_tokens": "reasoning tokens", "answer_tokens": "answer tokens"}
    columns = [*shares.values(), *tokens.values(), "n"]
    table = Table("table4_answers", "Answers: boxes, faults, tokens", columns)
    if not results.models:
        return table
    frame = metrics(results.scored, ["task", "model"], draws=20).set_index(["task", "model"])
    for task in ("vanilla", "amodal"):
        for model in results.models:
            if (task, model) in frame.index:
                row = frame.loc[(task, model)]
                cells = [Number(100 * row[name]) for name in shares]
                cells += [None if math.isnan(row[name]) else Number(row[name]) for name in tokens]
                table.rows.append(Row(f"{model}, {task}", "ours", [*cells, count(int(row["n"]))]))
    table.notes.append(
        "In percent; tokens: mean per answer. The first column is a mean over thresholds of IoU."
    )
    return table


def table_decoding(results: Results) -> Table:
    """Accuracy by way of decoding and number of tokens (`egm_lib.inference.decoding`)."""
    columns = ["accuracy", "difference to plain", "tokens an answer", "n"]
    table = Table("table4_decoding", "Other ways to decode", columns)
    others = ("sample-", PROMPTED)  # of the tables table4_samples and prompts
    variants = [name for name in results.variants if not name.partition("@")[2].startswith(others)]
    plain = list(dict.fromkeys(name.partition("@")[0] for name in variants)) or ["small-egm"]
    for model in plain:
        for name in [model, *(name for name in variants if name.partition("@")[0] == model)]:
            rows = results.of(name)
            if rows.empty:
                table.rows.append(Row(name, "ours", [None] * 4))
                continue
            tokens = tokens_of(rows)
            difference = "" if name == model else percent(gain(results, name, model))
            accuracy = percent(estimate(rows, over_splits=True, draws=results.draws))
            table.rows.append(
                Row(name, "ours", [accuracy, difference, Number(tokens.mean()), count(len(rows))])
            )
    table.notes.append(
        "Mean over the vanilla splits that were run. budget-N: the reasoning is closed after N "
        "tokens. majority-N: of N sampled answers, the box that most of the others overlap; the "
        "tokens are those of all N answers. A name without @: greedy decoding, as in Table 8."
    )
    return table


def table_prompts(results: Results) -> Table:
    """One model under each named prompt (`make prompts`), compared with the profile's own."""
    columns = ["accuracy", "difference to own", "n"]
    table = Table("prompts", "The same model under each named prompt", columns)
    for row in results.prompts:
        model, task, answers = row["model"], row["task"], row["answers"]
        own = answers == model
        label = f"{model}, {task}: {row['prompt']}" + (" (the profile's own)" if own else "")
        if row["not_asked"] is not None:
            cells = [f"not asked: {row['not_asked']}", "", ""]
        else:
            rows = results.of(answers, task)
            accuracy = percent(estimate(rows, over_splits=True, draws=results.draws))
            difference = "" if own else percent(gain(results, answers, model, task))
            cells = [accuracy, difference, count(len(rows) or None)]
        table.rows.append(Row(label, "ours", cells))
    table.notes.append(
        "In percent, mean over the splits that were run. difference to own: points, paired on "
        "samples. Prompts: egm_lib/prompts.py."
    )
    return table


def table_ablations(results: Results) -> Table:
    """GRPO taken apart (`make ablations`): short runs compared on one validation split."""
    columns = [
        "accuracy",
        "difference",
        "p (Holm)",
        "mean IoU",
        "tokens an answer",
        "n",
        "GRPO steps",
    ]
    table = Table("ablation_grpo", "SFT and GRPO taken apart, on a validation split", columns)
    found = results.ablations
    for steps in sorted(set(found["steps"])) or [STEPS]:
        rows = {
            name: found[(found["steps"] == steps) & (found["model"] == name)] for name in VARIANTS
        }
        whole = rows["sft-and-grpo"]
        tests = {
            name: paired_difference(rows[name], whole, draws=results.draws)
            for name in VARIANTS
            if len(whole)
        }
        tests.pop("sft-and-grpo", None)
        p_values = {
            name: test.p_value for name, test in tests.items() if test and test.p_value is not None
        }
        adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
        for name, variant in VARIANTS.items():
            if rows[name].empty:
                table.rows.append(Row(name, "ours", [None] * len(columns)))
                continue
            compared = (
                ["", ""]
                if name == "sft-and-grpo"
                else [percent(tests.get(name)), p_text(adjusted.get(name))]
            )
            tokens = tokens_of(rows[name])
            table.rows.append(
                Row(
                    name,
                    "ours",
                    [
                        percent(estimate(rows[name], draws=results.draws)),
                        *compared,
                        percent(estimate(rows[name], "iou", draws=results.draws)),
                        Number(tokens.mean()),
                        count(len(rows[name])),
                        count(0 if variant.changes is None else steps),
                    ],
                )
            )
    table.notes.append(
        "Short GRPO runs of equal length, which need not be that of the run itself. difference: "
        "paired, to sft-and-grpo, which has the profile's reward weight and KL. grpo: GRPO without "
        "SFT. reward-weight-1: the reward is success alone; reward-weight-0: IoU alone."
    )
    return table


def table_latency(results: Results) -> Table:
    """The numbers of Fig. 5: latency, measured by the protocol, and accuracy."""
    columns = [
        "at a time",
        "ms, mean",
        "ms, median",
        "ms, p95",
        "first token, ms",
        "tokens",
        "accuracy",
        "n",
    ]
    columns.append("measured on")
    table = Table("table4_latency", "Latency of requests, and accuracy", columns)
    for row in paper("fig5")["rows"]:
        milliseconds, accuracy = row["values"]
        cells = [
            NOT_REPORTED,
            Number(milliseconds, decimals=0),
            *[NOT_REPORTED] * 4,
            Number(accuracy),
            NOT_REPORTED,
            "L20 GPUs",
        ]
        table.rows.append(Row(row["name"], "paper", cells))
    for model in results.models:
        accuracy = accuracy_cells(results, model)[-1]
        for concurrency in CONCURRENCIES:
            stats = latency_stats(results, model, concurrency)
            if stats is None:
                table.rows.append(
                    Row(model, "ours", [count(concurrency), *[None] * 5, accuracy, None, None])
                )
                continue
            first = stats["first_token_mean"]
            table.rows.append(
                Row(
                    model,
                    "ours",
                    [
                        count(concurrency),
                        Number(stats["mean"], stats["ci95"]),
                        Number(stats["p50"]),
                        Number(stats["p95"]),
                        None if first is None else Number(first),
                        "" if stats["tokens"] is None else Number(stats["tokens"]),
                        accuracy,
                        count(stats["n"]),
                        stats["device"],
                    ],
                )
            )
    table.notes.append(
        "Ours: after a warm-up, the time from sending a request (image in memory) to its last "
        "token. Several at a time are one batch, whose answers come together, or concurrent "
        "requests to an endpoint. "
        f"Paper: {paper('fig5')['source']}; its released script measures at concurrency 64."
    )
    return table


def tokens_of(rows: DataFrame) -> Series:
    """Tokens of each answer. An endpoint that does not tell reasoning apart counts all as the
    answer's.
    """
    return rows["reasoning_tokens"].fillna(0) + rows["answer_tokens"]


def latency_stats(results: Results, model: str, concurrency: int = 1) -> dict | None:
    """Mean (with interval), p50 and p95 of a model's latency in ms; None if it was not run."""
    rows = results.latency
    if len(rows):
        asked = (rows["model"] == model) & (rows["concurrency"] == concurrency)
        rows = rows[asked & rows["latency_ms"].notna()]
    if rows.empty:
        return None
    mean = estimate(rows.assign(image_id=rows["sample_id"]), "latency_ms", draws=results.draws)
    first = rows["first_token_ms"].mean()
    tokens = tokens_of(rows)
    p50, p95 = np.percentile(rows["latency_ms"], [50, 95])
    return {
        "mean": round(mean.mean, 2),
        "ci95": mean.ci95 and [round(value, 2) for value in mean.ci95],
        "p50": round(float(p50), 2),
        "p95": round(float(p95), 2),
        "n": mean.n,
        "tokens": None if math.isnan(tokens.mean()) else round(float(tokens.mean()), 2),
        "first_token_mean": None if math.isnan(first) else round(float(first), 2),
        "device": ", ".join(sorted(set(rows["device"]))),
    }
