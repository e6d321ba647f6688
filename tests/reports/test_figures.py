"""Figures from files: complete runs are drawn, gaps are named, equal files give equal bytes."""

import json

import pandas as pd
import pytest
from matplotlib.figure import Figure
from toy_run import write_run

from egm_lib.evaluation.statistics import sample_fixed
from egm_lib.reports.figures import FIGURES, build_figures
from egm_lib.reports.figures.__main__ import main
from egm_lib.reports.figures.curves import _curve, _reward


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return write_run(folder / "runs", folder / "world"), folder


def test_every_figure_is_drawn_from_a_complete_run_and_listed(toy):
    run, folder = toy
    drawn = build_figures([run], folder / "figures", root=folder / "world")
    assert [figure.name for figure in drawn] == list(FIGURES)
    not_run = {figure.name for figure in drawn if figure.not_run}
    # EGM breaks nothing here, and none is missed by both; the experiment's arms are not all there
    assert not_run <= {"fig12", "hypotheses"}
    for figure in drawn:
        for file in figure.files:
            head = (folder / "figures" / file).read_bytes()[:4]
            assert head == {"png": b"\x89PNG", "pdf": b"%PDF"}[file.rpartition(".")[2]]
    listed = json.loads((folder / "figures" / "figures.json").read_text())
    assert [figure["name"] for figure in listed] == list(FIGURES)
    assert all(bool(figure["caption"]) != bool(figure["not_run"]) for figure in listed)


def test_bands_of_training_curves():
    """Two seeds: their range. Three: the t interval of 1, 2, 3 is 2 +- 4.303 / sqrt(3); it ends at
    0, since no KL, length or share is negative.
    """
    for first, seeds, expected in (
        (1, 1, (1.0, 1.0)),
        (1, 2, (1.0, 2.0)),
        (1, 3, (0.0, 2 + 2.4842)),
        (4, 3, (5 - 2.4842, 5 + 2.4842)),
    ):
        ax = Figure().subplots()
        frames = [
            pd.DataFrame({"step": range(1, 21), "loss": float(seed)})
            for seed in range(first, first + seeds)
        ]
        _curve(ax, frames, "loss", "vanilla")
        [band] = ax.collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx(expected, abs=1e-3)


def test_the_legend_covers_no_held_out_point():
    """Points all over the panel."""
    figure = Figure(figsize=(3.2, 2.8))
    ax = figure.subplots()
    frame = pd.DataFrame({"step": range(200), "reward": 0.3})
    frame["eval_reward"] = frame["step"] * 7 % 11 / 10
    _reward(ax, {"vanilla": [frame], "amodal": [frame]})
    figure.draw_without_rendering()
    legend = ax.get_legend().get_window_extent()
    points = ax.transData.transform(frame[["step", "eval_reward"]])
    assert not any(legend.contains(*point) for point in points)


def test_without_files_a_figure_is_not_run_and_an_old_one_is_removed(toy, tmp_path):
    run, folder = toy
    bare = tmp_path / "toy-3"
    (bare / "logs").mkdir(parents=True)
    out = tmp_path / "figures"
    out.mkdir()
    (out / "fig5.png").write_bytes(b"of an earlier run")
    drawn = {figure.name: figure for figure in build_figures([bare], out, root=folder)}
    assert all(figure.not_run and not figure.files for figure in drawn.values())
    assert "latency" in drawn["fig5"].not_run and "logs" in drawn["training"].not_run
    assert [file.name for file in out.iterdir()] == ["figures.json"]


def test_the_same_files_give_the_same_bytes(toy, tmp_path):
    run, folder = toy
    for name in ("one", "two"):
        build_figures([run], tmp_path / name, root=folder / "world", only=["fig2", "fig4"])
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_examples_are_drawn_at_random_but_always_the_same():
    assert (
        sample_fixed(range(100), 3)
        == sample_fixed(range(100), 3)
        == sorted(sample_fixed(range(100), 3))
    )
    assert sample_fixed([7], 3) == [7]


def test_unknown_names_are_refused_in_a_sentence(toy, tmp_path, capsys):
    run, folder = toy
    with pytest.raises(ValueError, match="unknown figure fig99"):
        build_figures([run], tmp_path, root=folder, only=["fig99"])
    assert main(["--profile", "no-such-profile"]) == 2
    assert "no-such-profile" in capsys.readouterr().err
