"""The registered experiment: what it asks of each seed, and whose runs it reports."""

from pathlib import Path

import pytest

from egm_lib.pipeline import experiment
from egm_lib.profile import load_profile
from egm_lib.run import Run


def asked_models(monkeypatch) -> list[list[str]]:
    """The options of every job, in their order; nothing is run."""
    commands = []
    monkeypatch.setattr(
        experiment, "run_jobs", lambda run, jobs: commands.extend(job.command for job in jobs)
    )
    return commands


def test_validation_scenes_are_asked_of_both_sides_of_the_selection(monkeypatch):
    """The learner beside the reference, before and after GRPO, greedy and sampled."""
    commands = asked_models(monkeypatch)
    experiment.validate(Run(load_profile("mini-full"), 0), "small-egm-unselected")
    assert all("--validation" in command for command in commands)
    assert {command[-1] for command in commands} == {
        "small-sft",
        "small-egm",
        "small-sft-control",
        "small-egm-unselected",
        "reference",
        "small-sft@sample-1",
        "small-egm@sample-1",
    }


@pytest.mark.parametrize(("seeds", "reported"), [([7], [7]), (None, [0, 1, 2])])
def test_the_report_is_of_the_seeds_that_were_run(monkeypatch, seeds, reported):
    ran, found = [], []
    monkeypatch.setattr(experiment, "run_experiment", ran.append)
    monkeypatch.setattr(experiment, "report", found.append)
    experiment._run_all(seeds)
    assert ran == reported
    names = [[(run.profile.name, run.seed) for run in runs] for runs in found]
    assert names == [
        [("mini-full", seed) for seed in reported],
        [("mini-uniform", seed) for seed in reported],
    ]


def test_a_report_takes_every_run_that_it_is_given(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(Run, "root", property(lambda run: tmp_path / f"x-{run.seed}"))
    monkeypatch.setattr(Run, "figures", property(lambda run: tmp_path / "figures"))
    monkeypatch.setattr(experiment, "build_tables", lambda roots, *a, **k: taken.append(roots))
    monkeypatch.setattr(experiment, "build_figures", lambda *a, **k: None)
    runs = [Run(load_profile("mini-full"), seed) for seed in (7, 8)]
    for run in runs:
        run.root.mkdir()
    experiment.report(runs)
    assert [Path(root).name for root in taken[0]] == ["x-7", "x-8"]
