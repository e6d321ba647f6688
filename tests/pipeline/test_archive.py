"""A restored run gives the same tables. An archive holds no checkpoint and overwrites nothing."""

import json
import shutil
import tarfile
from dataclasses import replace

import pytest
from roots import use_root
from toy_run import write_run
from trace_world import write_rows

from egm_lib import cli
from egm_lib.data.fetch import FetchError
from egm_lib.errors import InputError
from egm_lib.files import read_jsonl
from egm_lib.pipeline import archive
from egm_lib.profile import load_profile
from egm_lib.reports import curated
from egm_lib.reports.tables import build_tables
from egm_lib.run import Run


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    use_root(monkeypatch, tmp_path)
    toy = Run(replace(load_profile("mini"), name="toy"), 0)
    write_run(toy.root.parent, tmp_path / "world")
    for large in (
        "checkpoints/vanilla/small-egm/model.safetensors",
        "ablations/40-steps/no-kl/checkpoints/vanilla/small-egm/config.json",
        "curation/trace.ledger.jsonl",
        "logs/sft.txt",
    ):
        (toy.root / large).parent.mkdir(parents=True, exist_ok=True)
        (toy.root / large).write_text("large")
    (toy.root / "curation/trace.jsonl").write_text(json.dumps({"status": "filtered"}) + "\n")
    return toy


def tables(run: Run, out) -> dict[str, bytes]:
    build_tables([run.root], out, draws=20)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_restored_run_gives_the_same_tables(run, tmp_path):
    before = tables(run, tmp_path / "before")
    packed = archive.pack(run)
    assert packed.read_bytes() == archive.pack(run).read_bytes()  # as git wants it
    shutil.rmtree(run.root)
    assert archive.restore(run) == run.root
    after = tables(run, tmp_path / "after")
    assert after == before and len(after) > 30
    assert not list(run.root.rglob("*.safetensors")) and not list(run.root.rglob("*ledger*"))
    with tarfile.open(packed) as opened:
        assert all(member.uname == "" and member.mtime == 0 for member in opened)


def test_the_archive_has_counts_and_examples_in_place_of_curated_data(run):
    with tarfile.open(archive.pack(run)) as opened:
        names = opened.getnames()
    assert f"{run.root.name}/curated.json" in names
    assert not [
        name for name in names if {"traces", "curation", "checkpoints"} & set(name.split("/"))
    ]


def test_a_live_and_a_restored_run_show_the_same_of_their_curated_data(run):
    """By hand: 1 dropped of 2 answered, 1 failed; the words of the toy's traces; its samples."""
    outcomes = [{"status": "ok"}, {"status": "filtered", "filter": "echo"}, {"status": "failed"}]
    write_rows(run.root / "curation/verify-train.jsonl", outcomes)
    traces = read_jsonl(run.traces("amodal"))
    live = curated.summary(run.root)
    assert live["outcomes"]["verify-train"] == {"kept": 1, "failed": 1, "dropped": {"echo": 1}}
    words = sum(len(row["reasoning"].split()) for row in traces)
    images = len({row["image_id"] for row in traces})
    assert live["traces"]["amodal"] == {"samples": len(traces), "images": images, "words": words}
    assert all(row in traces for row in live["examples"]["amodal"])
    assert len(live["examples"]["amodal"]) == curated.EXAMPLES
    packed = archive.pack(run).read_bytes()
    shutil.rmtree(run.root)
    archive.restore(run)
    assert not run.traces("amodal").exists()
    assert curated.summary(run.root) == live
    assert archive.pack(run).read_bytes() == packed  # a restored run can be packed again


def test_new_curated_data_counts_before_the_archived_summary(run):
    archive.pack(run)
    shutil.rmtree(run.root)
    archive.restore(run)
    write_rows(run.traces("amodal"), [{"reasoning": "two words", "image_id": "1"}])
    assert curated.trace_counts(run.root, "amodal") == curated.TraceCounts(1, 1, 2)
    assert curated.trace_counts(run.root, "vanilla").samples > 1  # not curated again


@pytest.mark.parametrize(
    "odd",
    [
        [],
        {},
        {"outcomes": [], "traces": {}, "examples": {}},
        {"outcomes": {"trace": None}},
        {"outcomes": {"trace": [1, 2]}},
        {"outcomes": {"trace": {"kept": 1}}},
        {"outcomes": {"trace": {"kept": 1, "failed": 0, "dropped": ["echo"]}}},
        {"outcomes": {"trace": {"kept": 1, "failed": 0, "dropped": {"echo": None}}}},
        {"traces": {"amodal": {"samples": "many", "images": 1, "words": 1}}},
        {"examples": {"amodal": 3}},
    ],
)
def test_an_archived_summary_of_another_shape_is_one_sentence(tmp_path, odd):
    good = {
        "outcomes": {"trace": {"kept": 1, "failed": 0, "dropped": {"echo": 2}}},
        "traces": {"amodal": {"samples": 1, "images": 1, "words": 5}},
        "examples": {"amodal": [{"reasoning": "without an image"}, None]},
    }
    file = tmp_path / curated.SUMMARY
    file.write_text(json.dumps(good))
    assert curated.summary(tmp_path) == {**good, "examples": {"amodal": []}}
    file.write_text(json.dumps({**good, **odd} if odd and len(odd) == 1 else odd))
    with pytest.raises(InputError, match=f"{curated.SUMMARY}.*; {curated.RESTORE}"):
        curated.summary(tmp_path)


def test_nothing_is_written_over_and_a_broken_archive_leaves_nothing(run):
    packed = archive.pack(run)
    with pytest.raises(FileExistsError, match="move it away"):
        archive.restore(run)
    shutil.rmtree(run.root)
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(FetchError, match="broken archive"):
        archive.restore(run)
    assert not run.root.exists()


def test_a_restore_that_was_stopped_leaves_nothing(run, monkeypatch):
    archive.pack(run)
    shutil.rmtree(run.root)

    def stopped(packed, folder):
        (folder / run.root.name).mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(archive, "unpack", stopped)
    with pytest.raises(KeyboardInterrupt):
        archive.restore(run)
    assert list(run.root.parent.iterdir()) == []


def test_the_command_says_what_is_missing(capsys):
    assert archive.main(["--profile", "paper-qwen3vl-2b", "--restore"]) == 2
    assert "no archive in" in capsys.readouterr().err
    assert archive.main(["--profile", "paper-qwen3vl-2b"]) == 2
    assert "make reproduce PROFILE=paper-qwen3vl-2b" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_a_restore_says_where_images_come_from(run, monkeypatch, capsys, there):
    monkeypatch.setattr(cli, "load_profile", lambda name: replace(run.profile, seeds=(0,)))
    archive.pack(run)
    shutil.rmtree(run.root)
    if there:
        run.profile.data.path.mkdir(parents=True)
    assert archive.main(["--profile", "toy", "--restore"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(str(run.root)) and ("egm_lib.mini.world --out" not in output) is there
