"""The names of a run's files."""

from egm_lib import run
from egm_lib.profile import load_profile
from egm_lib.run import Run, open_run


def test_paths_of_a_run():
    run = Run(load_profile("mini"), 3)
    assert run.root.parts[-3:] == ("data", "runs", "mini-3")
    assert (
        run.predictions("small-egm", "refcoco+_testA")
        == run.root / "predictions/small-egm/refcoco+_testA.jsonl"
    )
    assert run.checkpoint("amodal", "small-sft") == run.root / "checkpoints/amodal/small-sft"


def test_a_run_of_a_notebook_has_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "project_root", lambda: tmp_path)
    opened = open_run("mini", 3)
    assert opened == Run(load_profile("mini"), 3)
    assert opened.root.is_dir() and opened.root.is_relative_to(tmp_path)


def test_roots_are_those_of_the_seeds_that_have_been_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "project_root", lambda: tmp_path)
    profile = load_profile("mini-full")
    for seed in (2, 0, 7):
        Run(profile, seed).root.mkdir(parents=True)
    names = [root.name for root in Run(profile, 7).roots]
    assert names == [
        "mini-full-0",
        "mini-full-2",
        "mini-full-7",
    ]  # 1 was not run, 7 is the run's own
