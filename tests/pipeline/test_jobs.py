"""Processes beside each other: their ends, their logs, their failures."""

import os
import sys
import time

import pytest

from egm_lib.pipeline.jobs import Job, JobFailed, run_side_by_side


def python(tmp_path, name, code):
    return Job(name, [sys.executable, "-S", "-c", code], tmp_path / "logs" / f"{name}.txt")


def test_logs_are_kept_and_appended(tmp_path):
    for _ in range(2):
        run_side_by_side([python(tmp_path, "a", "print('seen')")], workers=1)
    assert (tmp_path / "logs" / "a.txt").read_text() == "seen\nseen\n"


def test_a_failure_shows_the_end_of_its_log_and_stops_the_others(tmp_path):
    slow = python(
        tmp_path, "slow", "import time, pathlib; print('on', flush=True); time.sleep(600)"
    )
    bad = python(tmp_path, "bad", "print('line before'); raise SystemExit('no such image')")
    began = time.monotonic()
    with pytest.raises(JobFailed, match="(?s)bad ended with code 1.*line before\nno such image"):
        run_side_by_side([slow, bad], workers=2)
    assert time.monotonic() - began < 120


def test_jobs_run_on_so_many_workers_with_one_thread_each(tmp_path):
    code = (
        "import os, time, pathlib; p = pathlib.Path({folder!r}); mine = p / str(os.getpid());"
        "mine.touch(); time.sleep(0.3);"
        "print(len(list(p.iterdir())), os.environ.get('OMP_NUM_THREADS')); mine.unlink()"
    )
    folder = tmp_path / "running"
    folder.mkdir()
    jobs = [python(tmp_path, f"job{i}", code.format(folder=str(folder))) for i in range(4)]
    run_side_by_side(jobs, workers=2)
    seen = [job.log.read_text().split() for job in jobs]
    assert max(int(count) for count, _ in seen) <= 2
    assert {threads for _, threads in seen} == {"1"}


def test_a_single_worker_keeps_its_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    job = python(tmp_path, "a", "import os; print(os.environ['OMP_NUM_THREADS'])")
    run_side_by_side([job], workers=1)
    assert job.log.read_text().strip() == "7"


def test_interrupted_processes_are_ended(tmp_path, monkeypatch):
    job = python(tmp_path, "a", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")

    sleep, presses = time.sleep, []

    def interrupt(seconds):
        if not presses and job.log.read_text().strip():
            presses.append("Ctrl-C")
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr("egm_lib.pipeline.jobs.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([job], workers=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(job.log.read_text()), 0)
