"""The stage runner: what is done is kept, what changed runs again, and every way to stop is one
clear sentence.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import replace

import nbformat
import papermill
import pytest
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from papermill.parameterize import parameterize_path
from roots import use_root

from egm_lib.errors import InputError
from egm_lib.files import write_text
from egm_lib.pipeline import manifest
from egm_lib.pipeline import publish as publish_module
from egm_lib.pipeline import reproduce as module
from egm_lib.pipeline.jobs import visible_gpus
from egm_lib.pipeline.publish import ReproduceError, clean, code_of_file, publish
from egm_lib.pipeline.reproduce import reproduce
from egm_lib.profile import load_profile
from egm_lib.run import Run


def write_notebook(path, *sources):
    cells = [
        nbformat.v4.new_code_cell('profile = "mini"\nseed = 0', metadata={"tags": ["parameters"]})
    ]
    nbformat.write(
        nbformat.v4.new_notebook(cells=[*cells, *map(nbformat.v4.new_code_cell, sources)]), path
    )


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with three notebooks, whose execution is a function of the test's:
    `project.does[name]`.
    """
    (tmp_path / "notebooks").mkdir()
    for name in ("00_a", "01_b", "02_c"):
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", f"print('{name}')")
    use_root(monkeypatch, tmp_path)
    monkeypatch.setattr(manifest, "_hardware", dict)
    project = Run(load_profile("smoke"), 0)
    ran, does = [], {}

    def execute(source, target, parameters, **options):
        name = source.rpartition("/")[2].removesuffix(".ipynb")
        assert parameters == {"profile": "smoke", "seed": 0}
        ran.append(name)
        nbformat.write(nbformat.read(source, as_version=4), target)
        does.get(name, lambda: None)()

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return project, ran, does, tmp_path


def test_the_kernel_of_a_notebook_sees_no_gpu(project, monkeypatch):
    """A library that looks for GPUs would find those on which the notebook's jobs train."""
    run, _, does, _ = project
    monkeypatch.delenv("EGM_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    seen = []
    does["01_b"] = lambda: seen.append((os.environ["CUDA_VISIBLE_DEVICES"], visible_gpus()))
    reproduce(run)
    assert seen == [("", ["0", "1"])]


def use_revision(monkeypatch, revision):
    for owner in (manifest, module):
        monkeypatch.setattr(owner, "git_revision", revision)


def again(project, ran, **options):
    ran.clear()
    reproduce(project, **options)
    return list(ran)


def test_a_second_run_skips_everything(project):
    run, ran, _, _ = project
    assert again(run, ran) == ["00_a", "01_b", "02_c"]
    assert again(run, ran) == []
    assert again(run, ran, fresh=True) == ["00_a", "01_b", "02_c"]
    assert again(run, ran, fresh=True, first=1, last=1) == ["01_b"]


def test_the_manifest_states_the_revision_that_ran_not_one_that_looked_on(project, monkeypatch):
    run, ran, _, root = project
    use_revision(monkeypatch, lambda: "first")
    assert again(run, ran)
    use_revision(monkeypatch, lambda: "second")
    assert not again(run, ran) and json.loads(run.manifest.read_text())["git"] == "first"
    assert again(run, ran, fresh=True) and json.loads(run.manifest.read_text())["git"] == "second"


def test_figures_make_no_checkout_dirty_and_code_does(tmp_path, monkeypatch):
    use_root(monkeypatch, tmp_path)
    assert manifest.git_revision() == "unknown"
    (tmp_path / "figures").mkdir()
    for name in ("figures/a.md", "code.py"):
        (tmp_path / name).write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    revision = manifest.git_revision()
    (tmp_path / "figures/a.md").write_text("2")
    assert manifest.git_revision() == revision and len(revision) == 12
    (tmp_path / "code.py").write_text("2")
    assert manifest.git_revision() == f"{revision}-dirty"


def test_a_changed_notebook_runs_again_with_all_after_it(project):
    run, ran, _, root = project
    reproduce(run)
    write_notebook(root / "notebooks" / "01_b.ipynb", "print('changed')")
    assert again(run, ran) == ["01_b", "02_c"]


def test_prose_and_outputs_do_not_make_a_notebook_another(project):
    run, ran, _, root = project
    reproduce(run)
    book = nbformat.read(root / "notebooks" / "01_b.ipynb", as_version=4)
    book.cells.insert(0, nbformat.v4.new_markdown_cell("A better sentence."))
    book.cells[-1].outputs = [nbformat.v4.new_output("stream", text="01_b\n")]
    nbformat.write(book, root / "notebooks" / "01_b.ipynb")
    assert again(run, ran) == []


def test_a_deleted_checkpoint_is_made_again(project):
    run, ran, does, _ = project
    weights = run.checkpoint("vanilla", "small-sft") / "model.safetensors"

    def train():
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_text("weights")

    does["01_b"] = train
    reproduce(run)
    assert again(run, ran) == []
    weights.unlink()
    assert again(run, ran) == ["01_b", "02_c"]
    assert weights.exists() and again(run, ran) == []


def test_a_stage_that_stopped_goes_on_and_its_seconds_add_up(project):
    run, ran, does, _ = project

    def stop():
        time.sleep(0.2)
        raise KeyboardInterrupt

    does["01_b"] = stop
    with pytest.raises(KeyboardInterrupt):
        reproduce(run)
    entry = json.loads(run.manifest.read_text())["stages"]["01_b"]
    assert not entry["finished"] and entry["seconds"] >= 0.2
    does["01_b"] = lambda: time.sleep(0.2)
    assert again(run, ran) == ["01_b", "02_c"]
    assert json.loads(run.manifest.read_text())["wall_seconds"]["01_b"] >= 0.4


def test_a_failing_notebook_is_named_with_its_reason(project):
    run, ran, does, _ = project

    def fail():
        raise papermill.PapermillExecutionError(
            1, 5, "raise ..", "OSError", "No space left on device", []
        )

    does["01_b"] = fail
    with pytest.raises(ReproduceError, match="01_b stopped in its cell 5: No space left on device"):
        reproduce(run)
    assert ran == ["00_a", "01_b"]
    does.clear()
    assert again(run, ran) == ["01_b", "02_c"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DeadKernelError("Kernel died"), "01_b: its kernel died, most often because memory"),
        (NoSuchKernel("python3"), "no Jupyter kernel 'python3'; `make setup` installs"),
        (RuntimeError("Kernel didn't respond in 60 seconds"), "01_b: its kernel cannot start: .*"),
    ],
)
def test_a_kernel_that_dies_or_cannot_start_is_one_sentence(project, error, sentence):
    run, ran, does, _ = project

    def fail():
        raise error

    does["01_b"] = fail
    with pytest.raises(ReproduceError, match=sentence):
        reproduce(run)
    does.clear()
    assert again(run, ran) == ["01_b", "02_c"]  # what was finished is kept


def test_papermill_gets_the_paths_of_an_odd_folder_unchanged(tmp_path, monkeypatch):
    """It fills {name} in a path with a parameter, and stops at a name that is none."""
    root = tmp_path / "a {seed}; 'b' {} {{c}} \"d\""
    (root / "notebooks").mkdir(parents=True)
    write_notebook(root / "notebooks" / "00_a.ipynb", "print()")
    use_root(monkeypatch, root)
    monkeypatch.setattr(manifest, "_hardware", dict)
    run = Run(load_profile("smoke"), 0)

    def execute(source, target, parameters, **options):
        source, target = (parameterize_path(path, parameters) for path in (source, target))
        assert source == str(root / "notebooks" / "00_a.ipynb")
        assert target == str(run.notebook("00_a.ipynb"))
        nbformat.write(nbformat.read(source, as_version=4), target)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    reproduce(run)
    assert json.loads(run.manifest.read_text())["stages"]["00_a"]["finished"]


def test_two_processes_on_one_run_are_refused(project):
    run, ran, _, _ = project
    run.root.mkdir(parents=True)
    with open(run.root / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ReproduceError, match="another process is working on"):
            reproduce(run)
    assert ran == []
    reproduce(run)


def test_a_changed_profile_is_refused_with_what_changed(project):
    run, _, _, _ = project
    reproduce(run)
    other = Run(replace(run.profile, grpo=replace(run.profile.grpo, beta=0.5)), 0)
    with pytest.raises(ReproduceError, match="values.grpo.beta was 0.005, is 0.5"):
        reproduce(other)


def test_a_larger_budget_continues_the_same_run(project):
    """The advice to raise it must not end in another: to delete what was paid."""
    run, ran, _, _ = project
    reproduce(run)
    curation = replace(run.profile.curation, budget_usd=100.0)
    reproduce(Run(replace(run.profile, curation=curation), 0))
    assert ran == ["00_a", "01_b", "02_c"]


def test_first_and_last_are_numbers(project, monkeypatch):
    run, ran, _, _ = project
    monkeypatch.setattr(module, "load_profile", lambda name: run.profile)
    monkeypatch.setattr(module, "_show_results", lambda run: None)
    command = ["--profile", "smoke", "--seed", "0"]
    assert module.main([*command, "--first", "1", "--last", "1"]) == 0
    assert ran == ["01_b"]


def test_a_changed_base_model_is_refused(project, monkeypatch):
    run, _, _, _ = project
    reproduce(run)
    monkeypatch.setattr(manifest, "_weights_digest", lambda folder: "another")
    with pytest.raises(ReproduceError, match="models.large was .*, is 'another'"):
        reproduce(run)


def test_a_broken_manifest_is_named(project):
    run, _, _, _ = project
    reproduce(run)
    run.manifest.write_text('{"profile": "smo')
    with pytest.raises(InputError, match="manifest.json is not JSON .* delete it"):
        reproduce(run)


def test_the_manifest_says_what_ran(project):
    run, _, _, _ = project
    reproduce(run)
    manifest = json.loads(run.manifest.read_text())
    assert manifest["values"]["grpo"]["num_generations"] == run.profile.grpo.num_generations
    assert set(manifest["wall_seconds"]) == {"00_a", "01_b", "02_c"}
    assert {"git", "versions", "hardware", "models", "data"} <= manifest.keys()
    assert "torch" in manifest["versions"]


def test_the_manifest_states_the_protocol_that_a_run_followed(project):
    """A protocol that is edited after the answers is no registration."""
    run, _, _, root = project
    write_text(root / "docs" / "protocol.md", "frozen")
    reproduce(run)
    digest = hashlib.sha256(b"frozen").hexdigest()
    assert json.loads(run.manifest.read_text())["protocol"] == digest


def test_clean_strips_widget_state_and_keeps_the_image(tmp_path):
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "image/png": "aGk="}
    said = nbformat.v4.new_output(
        "stream", text=f"saved to {publish_module.project_root()}/data/runs/x.jsonl"
    )
    cell = nbformat.v4.new_code_cell(
        "viewer", outputs=[nbformat.v4.new_output("display_data", data=data), said]
    )
    cell.metadata["papermill"] = {"duration": 1.0}
    book = nbformat.v4.new_notebook(cells=[cell])
    book.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"version_major": 2}}
    book.metadata["papermill"] = {"input_path": "/home/someone/notebooks/07.ipynb"}
    nbformat.write(book, tmp_path / "07.ipynb")
    clean(tmp_path / "07.ipynb")
    text = (tmp_path / "07.ipynb").read_text()
    assert "aGk=" in text and "saved to data/runs/x.jsonl" in text
    assert not any(word in text for word in ("widget", "papermill", "/home/someone"))
    nbformat.validate(nbformat.read(tmp_path / "07.ipynb", as_version=4))


def test_published_notebooks_have_outputs_and_the_same_code(project, monkeypatch):
    run, ran, _, root = project
    reproduce(run)
    monkeypatch.setattr(publish_module, "NOTEBOOKS_OF", run.profile.name)
    write_text(run.figures / "summary.json", "{}")
    executed = nbformat.read(run.notebook("01_b.ipynb"), as_version=4)
    job = (
        "sft-vanilla: started\nsft-vanilla: 0 min 30 s, {'loss': 1}\nseen\n"
        "sft-vanilla: done in 1 min 05 s\n"
    )
    executed.cells[-1].outputs = [
        nbformat.v4.new_output("stream", text=job),
        nbformat.v4.new_output("stream", name="stderr", text="FutureWarning"),
        nbformat.v4.new_output("display_data", {"text/plain": "Loading weights: 100%"}),
    ]
    executed.cells[-1].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    executed.cells.insert(
        1, nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["injected-parameters"]})
    )
    nbformat.write(executed, run.notebook("01_b.ipynb"))
    before = code_of_file(root / "notebooks" / "01_b.ipynb")
    publish(run)
    assert code_of_file(root / "notebooks" / "01_b.ipynb") == before
    published = nbformat.read(root / "notebooks" / "01_b.ipynb", as_version=4).cells[-1]
    [output] = published.outputs
    assert output.text == "seen\n"  # neither the job's progress, nor warnings, nor bars
    assert published.metadata == {}
    assert again(run, ran) == []
    write_text(run.figures / "summary.json", "{}")
    write_notebook(root / "notebooks" / "02_c.ipynb", "print('newer')")
    # As before, without its outputs
    write_notebook(root / "notebooks" / "01_b.ipynb", "print('01_b')")
    with pytest.raises(ReproduceError, match="02_c.ipynb was changed since it was run"):
        publish(run)
    # All or none
    assert nbformat.read(root / "notebooks" / "01_b.ipynb", as_version=4).cells[-1].outputs == []


def test_only_publishing_replaces_published_figures(project):
    """A user's run leaves the committed results, and so `git status`, as they were."""
    run, *_ = project
    with pytest.raises(ReproduceError, match=r"summary.json is missing: run `make reproduce"):
        publish(run)
    assert run.figures == run.published
    write_text(run.figures / "summary.json", json.dumps({"git": "first", "seeds": [0]}))
    publish(run)
    assert json.loads((run.published / "published.json").read_text())["git"] == "first"
    assert run.figures != run.published
    write_text(run.figures / "summary.json", json.dumps({"git": "second", "seeds": [0]}))
    write_text(run.figures / "table4.md", "new")
    assert json.loads((run.published / "summary.json").read_text())["git"] == "first"
    publish(run)
    assert json.loads((run.published / "published.json").read_text())["git"] == "second"
    assert (run.published / "table4.md").read_text() == "new"


def test_a_publication_that_was_killed_is_done_again(project, monkeypatch):
    """Killed while the old results are removed: some are left, without the card, or none."""
    run, *_ = project
    write_text(run.figures / "summary.json", json.dumps({"git": "first"}))
    publish(run)
    write_text(run.figures / "summary.json", json.dumps({"git": "second"}))
    remove, published = shutil.rmtree, run.published

    def killed(folder, **options):
        if folder != published:
            return remove(folder, **options)
        (folder / "published.json").unlink(missing_ok=True)
        if whole:
            remove(folder)
        raise KeyboardInterrupt

    for whole in (False, True):
        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(run)
        monkeypatch.setattr(shutil, "rmtree", remove)
        assert published.exists() != whole
        publish(run)
        assert json.loads((published / "published.json").read_text())["git"] == "second"
        assert json.loads((published / "summary.json").read_text())["git"] == "second"
        assert not published.with_name(f"{published.name}.tmp").exists()


def test_command_line_says_one_sentence(capsys):
    assert module.main(["--profile", "minni"]) == 2
    assert "Did you mean 'mini'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_kernel_runs_and_fails_clearly(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    source = tmp_path / "notebooks" / "00_a.ipynb"
    write_notebook(source, "print(profile, seed)", "raise ValueError('the image is torn')")
    use_root(monkeypatch, tmp_path)
    run = Run(load_profile("smoke"), 7)
    with pytest.raises(ReproduceError, match="00_a stopped in its cell .: the image is torn"):
        reproduce(run)
    outputs = [
        str(cell.outputs) for cell in nbformat.read(run.notebook("00_a.ipynb"), as_version=4).cells
    ]
    assert any("smoke 7" in text for text in outputs)


def test_paid_services_want_a_budget_before_anything_is_asked(project, monkeypatch, capsys):
    run = Run(load_profile("paper-qwen3vl-2b"), 0)
    monkeypatch.delenv("EGM_BUDGET_USD", raising=False)
    with pytest.raises(ReproduceError, match="BUDGET="):
        module.agree_on_costs(run)
    monkeypatch.setenv("EGM_BUDGET_USD", "50")
    module.agree_on_costs(run)
    assert "Budget: 50 USD" in capsys.readouterr().out


def test_without_paid_services_nothing_is_said(project, capsys):
    module.agree_on_costs(project[0])
    assert capsys.readouterr().out == ""


def test_a_notebook_for_another_task_is_skipped(project, capsys):
    run, ran, _, root = project
    path = root / "notebooks" / "01_b.ipynb"
    book = nbformat.read(path, as_version=4)
    book.metadata["egm"] = {"tasks": ["amodal"]}
    nbformat.write(book, path)
    vanilla = replace(run.profile, tasks=("vanilla",))
    reproduce(Run(vanilla, 0))
    assert ran == ["00_a", "02_c"]
    assert "01_b: not needed" in capsys.readouterr().out


@pytest.mark.parametrize("odd", [3, None, "amodal", ["amodal"], {"tasks": "amodal"}, {"tasks": 1}])
def test_a_notebook_for_unknown_tasks_is_one_sentence(project, odd):
    run, ran, _, root = project
    path = root / "notebooks" / "00_a.ipynb"
    book = nbformat.read(path, as_version=4)
    book.metadata["egm"] = odd
    nbformat.write(book, path)
    with pytest.raises(ReproduceError, match='00_a.ipynb: its metadata "egm" is .*: put it back'):
        reproduce(run)
    assert ran == []


def test_the_committed_summary_is_that_of_the_last_commit(tmp_path, monkeypatch):
    use_root(monkeypatch, tmp_path)
    assert manifest.committed_json("a.json") is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    (tmp_path / "a.json").write_text('{"n": 1}')
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "a.json").write_text('{"n": 2}')
    assert manifest.committed_json("a.json") == {"n": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "holds a list, not an object"),
        ("{}", "has no 'values'"),
        ('{"values": {}, "models": [], "stages": {}, "wall_seconds": {}}', "'models' in .* a list"),
        (
            '{"values": {}, "models": {}, "stages": {"00_a": null}, "wall_seconds": {}}',
            "stage '00_a' is not a record",
        ),
        (
            '{"values": {}, "models": {}, "stages": {"00_a": {"key": 1}}, "wall_seconds": {}}',
            "stage '00_a' is not a record",
        ),
    ],
)
def test_a_manifest_of_another_shape_is_one_sentence(project, content, reason):
    run, ran, _, _ = project
    run.root.mkdir(parents=True)
    run.manifest.write_text(content)
    with pytest.raises((InputError, ReproduceError), match=f"{reason}.*delete it, and the run"):
        reproduce(run)
    assert ran == [] and run.manifest.read_text() == content


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cells": 1, "nbformat": 4}', "{", '"text"'])
def test_a_file_that_is_no_notebook_is_one_sentence(project, content):
    run, ran, _, root = project
    (root / "notebooks/01_b.ipynb").write_text(content)
    with pytest.raises(ReproduceError, match="01_b.ipynb is not a notebook .*: restore it"):
        reproduce(run)
