"""Tables 1-12, comparisons that the paper lacks, and summary.json, from a run's files alone.

    python -m egm_lib.reports.tables --profile mini [--rule vlmevalkit] [--only table4]

Every table goes to figures/<profile>/ as Markdown, CSV and LaTeX. The same files give the same
bytes. A table whose every cell is "not run" is not written, and an older one is removed.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from egm_lib.evaluation.results import MODELS, Results
from egm_lib.evaluation.scoring import split_keys
from egm_lib.evaluation.statistics import Difference, Estimate, estimate
from egm_lib.files import write_text
from egm_lib.reports.tables import beyond_paper, evidence, paper
from egm_lib.reports.tables.cells import (
    Table,
    stated_text,
    to_csv,
    to_latex,
    to_markdown,
)

TABLES: dict[str, Callable[[Results], Table]] = {
    **{f"table{number}": getattr(paper, f"table{number}") for number in range(1, 13)},
    "table4_differences": beyond_paper.table_differences,
    "table4_kinds": beyond_paper.table_kinds,
    "table4_rules": beyond_paper.table_rules,
    "table4_answers": beyond_paper.table_answers,
    "table4_decoding": beyond_paper.table_decoding,
    "table4_latency": beyond_paper.table_latency,
    "table4_samples": evidence.table_samples,
    "table4_ways": evidence.table_ways,
    "table4_validation": evidence.table_validation,
    "prompts": beyond_paper.table_prompts,
    "ablation_grpo": beyond_paper.table_ablations,
    "hypotheses": evidence.table_hypotheses,
}


def build_tables(
    run_roots: Sequence[Path],
    out_dir: Path,
    *,
    rule: str = "egm",
    draws: int = 2000,
    only: Sequence[str] | None = None,
) -> dict[str, Table]:
    """Writes every table (or those named in `only`) and summary.json to out_dir.

    run_roots: the runs of one profile, one a seed. Several are pooled; intervals then cover seeds
    as well as images. Returns the tables by name, also those that were not run and not written.
    """
    results = Results(run_roots, rule, draws)
    stamp = (
        f"Profile {results.profile}, seeds {', '.join(map(str, results.seeds))}, rule {rule}, "
        f"git {stated_text(results.stated('git'))}. Intervals: 95 %."
    )
    tables = {
        name: build(results) for name, build in TABLES.items() if only is None or name in only
    }
    out_dir = Path(out_dir)
    for name, table in tables.items():
        for suffix, text in (
            ("md", to_markdown(table, stamp)),
            ("csv", to_csv(table, results)),
            ("tex", to_latex(table, stamp)),
        ):
            path = out_dir / f"{name}.{suffix}"
            if table.was_run or only is not None:  # who asks for a table by name, gets it
                write_text(path, text)
            else:
                path.unlink(missing_ok=True)
    if only is None:
        write_text(
            out_dir / "summary.json",
            json.dumps(summary(results), indent=1, ensure_ascii=False) + "\n",
        )
    return tables


def summary(results: Results) -> dict:
    """The headline numbers, shares in 0..1; null for a model that was not run."""
    names = list(dict.fromkeys([*MODELS, *results.models]))

    def accuracy(model: str, task: str) -> dict | None:
        rows = results.of(model, task)
        value = estimate(rows, over_splits=True, draws=results.draws)
        return value and {**_rounded(value), "splits": int(split_keys(rows).nunique())}

    def complex_share(model: str) -> dict | None:
        causes = results.majority_causes(model)
        return (
            None
            if causes.empty
            else _rounded(paper.cause_shares(causes, results.draws)["COMPLEX-PROMPT"])
        )

    def tokens(model: str) -> dict | None:
        rows = results.of(model)
        if rows.empty:
            return None
        means = [rows[name].mean() for name in ("reasoning_tokens", "answer_tokens")]
        if any(map(math.isnan, means)):
            return None
        return {
            "reasoning": round(means[0], 2),
            "answer": round(means[1], 2),
            "mean": round(sum(means), 2),
        }

    differences = {
        f"{task}: {a} - {b}": {
            **_rounded(value),
            "p": None if value.p_value is None else round(value.p_value, 6),
        }
        for task in ("vanilla", "amodal")
        for a, b in beyond_paper.COMPARISONS
        if (value := paper.gain(results, a, b, task)) is not None
    }
    return {
        "profile": results.profile,
        "seeds": results.seeds,
        "git": results.stated("git"),
        "hardware": results.stated("hardware"),
        "rule": results.rule,
        "acc_at_50": {name: accuracy(name, "vanilla") for name in names},
        "amodal_acc_at_50": {name: accuracy(name, "amodal") for name in names},
        "differences": differences,
        "complex_share_of_failures": {name: complex_share(name) for name in names},
        "latency_ms": {name: beyond_paper.latency_stats(results, name) for name in names},
        "tokens": {name: tokens(name) for name in names},
        "wall_seconds": results.seconds(),
    }


def _rounded(value: Estimate | Difference) -> dict:
    return {
        "mean": round(value.mean, 7),
        "ci95": None if value.ci95 is None else [round(end, 7) for end in value.ci95],
        "n": value.n,
    }
