"""The SLURM script: every placeholder filled in, and a clear word where there is no SLURM."""

import pytest
from roots import use_root

from egm_lib.pipeline import submit
from egm_lib.profile import load_profile
from egm_lib.run import Run


def test_the_template_is_filled_in():
    text = submit.render(Run(load_profile("paper-qwen3vl-8b"), 42), hours=12)
    assert "{{" not in text
    for words in (
        "--gpus-per-node=8",
        "--time=12:00:00",
        "--requeue",
        "--first 04 --last 06",
        "paper-qwen3vl-8b-42",
    ):
        assert words in text


def test_an_unknown_placeholder_is_named(tmp_path, monkeypatch):
    template = tmp_path / "slurm.sh.template"
    template.write_text("#SBATCH --account={{account}}")
    monkeypatch.setattr(submit, "TEMPLATE", template)
    with pytest.raises(ValueError, match="asks for account"):
        submit.render(Run(load_profile("mini"), 0), hours=1)


def test_without_slurm_the_script_is_written_and_another_way_is_named(
    tmp_path, monkeypatch, capsys
):
    use_root(monkeypatch, tmp_path)
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    assert submit.main(["--profile", "mini"]) == 2
    assert "--launcher local" in capsys.readouterr().err
    assert (tmp_path / "data/runs/mini-0/submit.sh").read_text().startswith("#!/bin/bash")
