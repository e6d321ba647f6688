"""Failure causes named by several judges, and how far the judges agree (Tables 1 and 12)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa

from egm_lib.curation.outputs import read_output
from egm_lib.curation.tasks import CAUSES
from egm_lib.files import write_jsonl


def write_judgements(path: Path, outs: Mapping[str, Path]) -> int:
    """Gather outputs of task `failure` into rows {sample_id, judge, cause}; returns their number.

    outs: judge -> output file. A failure without a verdict of a judge has no row of that judge.
    """
    return write_jsonl(
        path,
        (
            {"sample_id": row["sample_id"], "judge": judge, "cause": row["answer"]}
            for judge, out in outs.items()
            for row in read_output(out)
            if row["status"] == "ok" and row.get("answer") in CAUSES
        ),
    )


def agreement(
    judgements: pd.DataFrame, clusters: Mapping[str, str] | None = None, *, draws: int = 500
) -> pd.DataFrame:
    """Agreement on the failures that all judges judged: one row per pair, and one for all.

    judgements: columns sample_id, judge, cause. clusters: sample_id -> image, the unit that the
    bootstrap draws.
    Columns: percent of equal verdicts (for all: unanimous ones); kappa (Cohen's; for all:
    Fleiss'); low and high, its 95 % interval (Cohen's from its standard error, Fleiss' by
    bootstrap); n. A kappa is nan where all verdicts are the same.
    """
    judgements = judgements.reindex(columns=["sample_id", "judge", "cause"])
    judgements = judgements.drop_duplicates(["sample_id", "judge"], keep="last")
    verdicts_N_J = judgements.pivot(index="sample_id", columns="judge", values="cause").dropna()
    judges = list(verdicts_N_J.columns)
    codes_N_J = (
        verdicts_N_J.apply(lambda column: column.map(CAUSES.index))
        .to_numpy(int)
        .reshape(len(verdicts_N_J), len(judges))
    )
    rows = {}
    for a, b in combinations(range(len(judges)), 2) if len(codes_N_J) else ():
        table_C_C = np.zeros((len(CAUSES), len(CAUSES)))
        np.add.at(table_C_C, (codes_N_J[:, a], codes_N_J[:, b]), 1)
        # 0 / 0 where every verdict is the same
        with np.errstate(invalid="ignore", divide="ignore"):
            cohen = cohens_kappa(table_C_C)
        percent = 100 * np.mean(codes_N_J[:, a] == codes_N_J[:, b])
        rows[f"{judges[a]} - {judges[b]}"] = [
            percent,
            cohen.kappa,
            cohen.kappa_low,
            cohen.kappa_upp,
            len(codes_N_J),
        ]
    if len(judges) > 1 and len(codes_N_J):
        unanimous = 100 * np.mean((codes_N_J == codes_N_J[:, :1]).all(axis=1))
        names = [clusters[name] if clusters else name for name in verdicts_N_J.index]
        low, high = _fleiss_interval(codes_N_J, pd.factorize(pd.Series(names))[0], draws)
        rows["all"] = [unanimous, _fleiss(codes_N_J), low, high, len(codes_N_J)]
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=["percent", "kappa", "low", "high", "n"]
    )


def _fleiss(codes_N_J: np.ndarray) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(fleiss_kappa(aggregate_raters(codes_N_J, n_cat=len(CAUSES))[0]))


def _fleiss_interval(
    codes_N_J: np.ndarray, cluster_N: np.ndarray, draws: int
) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(cluster_N == cluster) for cluster in range(cluster_N.max() + 1)]
    drawn = (rng.integers(len(members), size=len(members)) for _ in range(draws))
    kappas_D = [_fleiss(codes_N_J[np.concatenate([members[i] for i in draw])]) for draw in drawn]
    low, high = (
        np.nanpercentile(kappas_D, [2.5, 97.5]) if np.isfinite(kappas_D).any() else (np.nan, np.nan)
    )
    return float(low), float(high)
