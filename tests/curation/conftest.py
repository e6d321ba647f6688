"""What the tests of curation share."""

import pytest
from curation_world import teacher

from egm_lib.curation import client
from egm_lib.curation.client import run_task
from egm_lib.curation.outputs import JsonlSamples
from egm_lib.curation.tasks import TASKS


@pytest.fixture
def run(tmp_path):
    """run(task, samples, service, **options): a quiet run in tmp_path; run.rows(task): its rows."""

    def run(name, samples, service=None, **options):
        paths = {
            "out": tmp_path / f"{name}.out.jsonl",
            "ledger": tmp_path / "ledger.jsonl",
            "root": tmp_path,
        }
        return run_task(
            TASKS[name], samples, service or teacher(), progress=False, **(paths | options)
        )

    run.out = lambda name: tmp_path / f"{name}.out.jsonl"
    run.rows = lambda name: list(JsonlSamples(run.out(name)))
    return run


@pytest.fixture
def without_pauses(monkeypatch):
    """Retries come at once."""

    async def at_once(_):
        return None

    monkeypatch.setattr(client.asyncio, "sleep", at_once)
    monkeypatch.setattr(client._Asker, "_sync", at_once)
