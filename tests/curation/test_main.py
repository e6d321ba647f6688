"""python -m egm_lib.curation: exit status, messages, and no file that is overwritten."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from curation_server import running
from curation_world import make_root

from egm_lib.curation.__main__ import main
from egm_lib.curation.outputs import JsonlSamples


def cli(folder, url, *more, task="trace", **options):
    words = [
        task,
        "--input",
        folder / "samples.jsonl",
        "--output",
        folder / "out.jsonl",
        "--base-url",
        url,
    ]
    command = [sys.executable, "-m", "egm_lib.curation", *words, "--model", "fake", *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def test_command_line(tmp_path):
    make_root(tmp_path, 12)
    secret = "sk-very-secret-0123456789"
    environment = os.environ | {"OPENAI_API_KEY": secret, "OPENAI_LOG": "debug"}
    with running() as url:
        dry = cli(tmp_path, url, "--dry-run", env=environment)
        assert (
            dry.returncode == 0
            and "12 requests" in dry.stdout
            and not (tmp_path / "out.jsonl").exists()
        )
        some = cli(tmp_path, url, "--limit", "5", "--concurrency", "2", env=environment)
        assert some.returncode == 0 and "kept" in some.stdout
        rows = list(JsonlSamples(tmp_path / "out.jsonl"))
        assert len(rows) == 5 and all(
            row["status"] == "ok" and row["usage"] and row["answer"] for row in rows
        )
        poor = cli(tmp_path, url, "--budget", "0.0000001", env=environment)
        assert poor.returncode == 4 and "budget" in poor.stdout
    (tmp_path / "images/3.png").write_bytes(b"no image")
    with running() as url:
        some_fail = cli(tmp_path, url, env=environment)
    assert some_fail.returncode == 3 and "s7" in some_fail.stdout
    assert Counter(row["status"] for row in JsonlSamples(tmp_path / "out.jsonl")) == {
        "ok": 9,
        "failed": 3,
    }
    for done in (dry, some, poor, some_fail):
        assert secret not in done.stdout + done.stderr
    missing = cli(tmp_path / "none", "http://127.0.0.1:9/v1")
    assert missing.returncode == 2 and re.search("no file .*samples.jsonl", missing.stderr)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--output", "samples.jsonl"], "is the input"),
        (["--output", "out.jsonl", "--ledger", "samples.jsonl"], "is the input"),
        (["--output", "out.jsonl", "--ledger", "out.jsonl"], "it is the ledger"),
        (["--output", "images"], "it is a folder"),
        (["--output", "out.jsonl", "--ledger", "teacher.jsonl"], "teacher.jsonl is not a ledger"),
        (["--output", "out.jsonl", "--ledger", "images"], "images"),
        (["--output", "samples.jsonl/out.jsonl"], "cannot write samples.jsonl/out"),
    ],
)
def test_no_file_of_the_users_is_overwritten(tmp_path, monkeypatch, capsys, words, reason):
    make_root(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    address = ["--base-url", "mini", "--model", "m", "--price", "1", "1"]
    assert main(["verify", "--input", "samples.jsonl", *address, *words]) == 2
    assert reason in (output := capsys.readouterr().err) and len(output.splitlines()) == 1
    assert {path: path.read_bytes() for path in before} == before
