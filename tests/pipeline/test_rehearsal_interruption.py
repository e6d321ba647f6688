"""A training is killed for a rehearsal: at its first whole checkpoint, with all its processes."""

import sys
from types import SimpleNamespace

import psutil
import pytest

from egm_lib.pipeline.jobs import Job
from egm_lib.pipeline.rehearsal import interruption
from egm_lib.pipeline.rehearsal.checks import RehearsalError
from egm_lib.run import Run

# As torch's launcher does: its workers have a session of their own, so that no signal to a group
# of processes reaches them all. What is left alone ends well, after some seconds
LAUNCHER = """
import pathlib, subprocess, sys, time
work = pathlib.Path(sys.argv[1])
script = "import pathlib, sys, time; time.sleep(15); pathlib.Path(sys.argv[1]).touch()"
worker = subprocess.Popen([sys.executable, "-c", script, str(work / "ended-well")],
                          start_new_session=True)
(work / "checkpoint-1").mkdir(parents=True)
time.sleep(0.3)
(work / "pid").write_text(str(worker.pid))
(work / "checkpoint-1" / "complete").write_text("")
time.sleep(15)
(work / "ended-well").touch()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "root", tmp_path / "run")
    return Run(SimpleNamespace(tasks=("vanilla",)), 0)


def launch(run, monkeypatch, script):
    work = interruption.work_folder(run.checkpoint("vanilla", "small-sft"))
    command = [sys.executable, "-c", script, str(work)]
    log = run.log("sft-vanilla.txt")
    monkeypatch.setattr(interruption, "training_job", lambda *_: Job("sft-vanilla", command, log))
    return work


def test_all_processes_end_and_the_checkpoint_stays(run, monkeypatch):
    work = launch(run, monkeypatch, LAUNCHER)
    interruption.kill_sft(run)
    assert not psutil.pid_exists(int((work / "pid").read_text()))
    assert not (work / "ended-well").exists()
    assert (work / "checkpoint-1" / "complete").exists()


def test_a_training_that_ends_before_its_first_checkpoint_is_named(run, monkeypatch):
    launch(run, monkeypatch, "raise SystemExit(3)")
    with pytest.raises(RehearsalError, match="sft-vanilla ended with code 3 before"):
        interruption.kill_sft(run)


def test_a_rehearsal_that_continues_kills_nothing(run, monkeypatch):
    work = launch(run, monkeypatch, "raise SystemExit(3)")
    (work / "checkpoint-1").mkdir(parents=True)
    (work / "checkpoint-1" / "complete").write_text("")
    monkeypatch.setattr(interruption.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    interruption.kill_sft(run)


def test_a_rehearsal_that_was_stopped_before_the_first_checkpoint_kills_again(run, monkeypatch):
    """Else SFT would begin anew, and the rehearsal fail at its end for want of an interruption."""
    launch(run, monkeypatch, "raise SystemExit(3)").mkdir(parents=True)
    with pytest.raises(RehearsalError, match="ended with code 3 before"):
        interruption.kill_sft(run)
