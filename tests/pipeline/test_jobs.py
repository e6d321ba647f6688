"""Processes beside each other: their ends, their logs, their failures."""

import inspect
import os
import sys
import time
from dataclasses import replace

import pytest
from torch.distributed.elastic.multiprocessing.api import PContext

from egm_lib.pipeline import predict
from egm_lib.pipeline.jobs import (
    STOP_S,
    Job,
    JobFailed,
    data_job,
    latency_job,
    prediction_jobs,
    run_jobs,
    run_side_by_side,
    shard_jobs,
    without_gpus,
)
from egm_lib.profile import load_profile
from egm_lib.run import Run


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


def interrupted(monkeypatch, job: Job) -> str:
    """What a job's log says after a Ctrl-C, which comes once the job has printed something."""
    sleep, presses = time.sleep, []

    def interrupt(seconds):
        if not presses and job.log.read_text().strip():
            presses.append("Ctrl-C")
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr("egm_lib.pipeline.jobs.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([job], workers=1)
    return job.log.read_text()


def test_interrupted_processes_are_ended(tmp_path, monkeypatch):
    job = python(tmp_path, "a", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    process_id = int(interrupted(monkeypatch, job))
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


def test_an_interrupted_launcher_has_the_time_to_end_its_own_processes(tmp_path, monkeypatch):
    """Else they are orphans, and hold the GPUs. torch's launcher gives them 30 s."""
    code = (
        "import signal, sys, time\n"
        "def stop(*_): time.sleep(1); print('all ended', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop); print('began', flush=True); time.sleep(600)"
    )
    assert interrupted(monkeypatch, python(tmp_path, "a", code)) == "began\nall ended\n"
    assert inspect.signature(PContext.close).parameters["timeout"].default < STOP_S


@pytest.fixture
def paper():
    return Run(load_profile("paper-qwen3vl-8b"), 42)


def gpus(monkeypatch, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    monkeypatch.delenv("EGM_VISIBLE_DEVICES", raising=False)


def seen_gpus(tmp_path, counts) -> list[str]:
    """What jobs of so many GPUs, which run at the same time, see in CUDA_VISIBLE_DEVICES."""
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [replace(python(tmp_path, f"{n}", code), gpus=gpus) for n, gpus in enumerate(counts)]
    run_side_by_side(jobs, workers=len(jobs))
    return [job.log.read_text().strip() for job in jobs]


def test_a_job_sees_its_own_gpus_and_no_others(tmp_path, monkeypatch):
    gpus(monkeypatch, 4)
    assert seen_gpus(tmp_path, [1, 2, 0, 1]) == ["0", "1,2", "", "3"]


def test_a_kernel_sees_no_gpu_and_its_jobs_do(tmp_path, monkeypatch):
    monkeypatch.delenv("EGM_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8f")
    with without_gpus():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert seen_gpus(tmp_path, [1, 1]) == ["5", "GPU-8f"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,GPU-8f"


def shards_of(jobs) -> list[str]:
    """The --shard of each job; "-" where there is none."""
    return [
        job.command[list(job.command).index("--shard") + 1] if "--shard" in job.command else "-"
        for job in jobs
    ]


def test_a_model_is_asked_by_as_many_processes_as_copies_of_it_fit(paper, monkeypatch):
    gpus(monkeypatch, 8)
    small = prediction_jobs(paper, ["small-base"])
    assert shards_of(small) == [f"{number}/8" for number in range(1, 9)]
    assert {job.gpus for job in small} == {1}
    large = prediction_jobs(paper, ["large-base"])  # one copy takes all eight
    assert shards_of(large) == ["-"] and large[0].gpus == 8
    intern = Run(load_profile("paper-internvl3-8b"), 42)
    assert shards_of(prediction_jobs(intern, ["large-base"])) == ["1/2", "2/2"]
    reference = shard_jobs(paper, ["reference"], "training.selection", "--role", "reference")
    assert shards_of(reference) == ["-"] and reference[0].gpus == 8
    learner = shard_jobs(paper, ["small-sft"], "training.selection", "--role", "learner")
    assert len(learner) == 8 and "--role" in learner[0].command
    logs = [job.log for job in [*small, *large, *learner]]
    assert len(set(logs)) == len(logs) and all(log.parent == paper.root / "logs" for log in logs)


def test_a_machine_with_fewer_gpus_runs_fewer_processes(paper, monkeypatch):
    gpus(monkeypatch, 2)
    assert shards_of(prediction_jobs(paper, ["small-base"])) == ["1/2", "2/2"]


def test_without_gpus_the_profile_says_how_many_processes(monkeypatch):
    gpus(monkeypatch, 0)
    profile = load_profile("mini")

    def jobs(workers):
        launch = replace(profile.launch, prediction_workers=workers)
        return prediction_jobs(Run(replace(profile, launch=launch), 0), ["small-base", "small-egm"])

    assert shards_of(jobs(1)) == ["-"]
    assert shards_of(jobs(3)) == ["1/3", "2/3", "3/3"]
    # Each answers for all models: it loads its libraries once
    for job in jobs(3):
        assert [word for word in job.command if word.startswith("small-")] == [
            "small-base",
            "small-egm",
        ]


@pytest.mark.parametrize(
    ("engine", "count", "processes"),
    [("transformers", 1, 1), ("vllm", 1, 2), ("transformers", 2, 4)],
)
def test_one_gpu_s_models_share_a_process_unless_vllm_runs_them(
    paper, monkeypatch, engine, count, processes
):
    gpus(monkeypatch, count)
    generation = replace(paper.profile.generation, engine=engine)
    run = Run(replace(paper.profile, generation=generation), 42)
    assert len(prediction_jobs(run, ["small-base", "small-sft"])) == processes


def test_a_server_is_asked_by_one_process_that_takes_no_gpu(paper, monkeypatch):
    gpus(monkeypatch, 8)
    url = "http://localhost:8000/v1"
    large = replace(paper.profile.models.large, base_url=url)
    models = replace(paper.profile.models, large=large)
    run = Run(replace(paper.profile, models=models), 42)
    jobs = prediction_jobs(run, ["small-base", "large-base"])
    assert [job.gpus for job in jobs if "large-base" in job.command] == [0]
    assert len(jobs) == 1 + 8


def test_latency_is_measured_in_one_process_with_the_gpus_of_the_largest_model(paper, monkeypatch):
    gpus(monkeypatch, 8)
    job = latency_job(paper, ["small-base", "large-base"])
    assert job.gpus == 8 and "--latency" in job.command and "--shard" not in job.command


def test_shards_run_at_the_same_time_also_where_jobs_do_not(tmp_path, monkeypatch):
    gpus(monkeypatch, 0)
    seen = []
    monkeypatch.setattr(
        "egm_lib.pipeline.jobs.run_side_by_side", lambda jobs, workers: seen.append(workers)
    )
    profile = load_profile("paper-qwen3vl-8b")
    launch = replace(profile.launch, prediction_workers=3)
    run = Run(replace(profile, launch=launch), 0)
    run_jobs(run, prediction_jobs(run, ["small-base"]))
    run_jobs(run, [python(tmp_path, name, "") for name in "ab"])
    assert seen == [3, 1]


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("paper-qwen3vl-8b", ["--task=vanilla", "--task=amodal"]),
        ("paper-qwen3vl-8b-amodal", ["--task=amodal"]),
    ],
)
def test_data_are_prepared_for_the_profile_s_tasks_alone(name, tasks):
    """Else a machine without the files of the other task stops in the first notebook."""
    command = data_job(Run(load_profile(name), 0)).command
    assert [word for word in command if word.startswith("--task")] == tasks


def test_an_unknown_profile_is_one_sentence(capsys):
    """`make evaluate`, too."""
    assert predict.main(["--profile", "eval-egm-9b", "--model", "small-egm"]) == 2
    assert "There is no profile 'eval-egm-9b'" in capsys.readouterr().err
