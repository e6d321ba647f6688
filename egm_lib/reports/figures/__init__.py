"""The paper's figures, and a few that it lacks, from a run's files alone.

    python -m egm_lib.reports.figures --profile mini [--only fig5]

Every figure goes to figures/<profile>/ as PNG and PDF; figures.json says what each shows, or why it
was not run. Examples are drawn at random from all that qualify, always the same ones, and never
picked by hand.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from egm_lib.errors import InputError
from egm_lib.evaluation.results import Results
from egm_lib.files import write_text
from egm_lib.reports.figures.accuracy import fig5, iou_histogram, lookalikes, solved_share
from egm_lib.reports.figures.comparisons import forest, hypotheses, splits
from egm_lib.reports.figures.curves import training
from egm_lib.reports.figures.examples import fig3, fig4, fig6, fig12, overview, viewer
from egm_lib.reports.figures.failures import fig2, fig2_examples
from egm_lib.reports.figures.material import Drawn, Material, NotRun, data_root, parameters_of
from egm_lib.viewer.palette import save, styled

FIGURES: dict[str, tuple[str, Callable[[Material], tuple[Figure, str]]]] = {
    "overview": ("EGM at a glance", overview),
    "fig5": ("Fig. 1, 5: accuracy against latency", fig5),
    "forest": ("Differences between models", forest),
    "hypotheses": ("The registered hypotheses", hypotheses),
    "splits": ("Accuracy by split", splits),
    "fig2": ("Fig. 2: failures by cause", fig2),
    "fig2_examples": ("Fig. 2: one failure of each cause", fig2_examples),
    "fig3": ("Fig. 3: curated reasoning", fig3),
    "fig4": ("Fig. 4: what EGM solves", fig4),
    "fig6": ("Fig. 6: amodal", fig6),
    "fig12": ("Fig. 12: where it still fails", fig12),
    "training": ("Training: six questions", training),
    "iou": ("IoU before and after", iou_histogram),
    "solved": ("Table 11: share of failures solved", solved_share),
    "lookalikes": ("Accuracy by look-alikes and kind of prompt", lookalikes),
    "viewer": ("The trace viewer", viewer),
}


def build_figures(
    run_roots: Sequence[Path],
    out_dir: Path,
    *,
    root: Path | None = None,
    rule: str = "egm",
    parameters: Mapping[str, int] | None = None,
    only: Sequence[str] | None = None,
) -> list[Drawn]:
    """Writes every figure (or those in `only`) to out_dir as PNG and PDF, and figures.json.

    run_roots: the runs of one profile, one a seed. root: the data root. parameters: number of
    parameters by model. The profile says both where they are not given. A figure whose files are
    absent is not made, and an older one is removed. Returns what was made.
    """
    results, out_dir = Results(run_roots, rule), Path(out_dir)
    if unknown := set(only or ()) - set(FIGURES):
        raise InputError(
            f"unknown figure {', '.join(sorted(unknown))}: use one of {', '.join(FIGURES)}"
        )
    material = Material(results, root or data_root(results), parameters or parameters_of(results))
    drawn = []
    for name, (title, build) in FIGURES.items():
        if only is not None and name not in only:
            continue
        files = [out_dir / f"{name}.{suffix}" for suffix in ("png", "pdf")]
        try:
            with styled():
                figure, caption = build(material)
            for file in files:
                save(figure, file)
            drawn.append(Drawn(name, title, caption, files=tuple(file.name for file in files)))
        except NotRun as reason:
            for file in files:
                file.unlink(missing_ok=True)
            drawn.append(Drawn(name, title, not_run=str(reason)))
    if only is None:
        write_text(
            out_dir / "figures.json",
            json.dumps([vars(figure) for figure in drawn], indent=1, ensure_ascii=False) + "\n",
        )
    return drawn
