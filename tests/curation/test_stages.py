"""The curation of a run: the profile's services and files, one budget, one estimate."""

import dataclasses

import pytest
from curation_world import make_root, teacher

from egm_lib.curation import stages
from egm_lib.curation.options import CurationError
from egm_lib.curation.outputs import kept
from egm_lib.curation.stages import estimate_run, is_paid, judge_failures, run_stage
from egm_lib.data import eval_splits, split_id
from egm_lib.files import read_jsonl, write_jsonl
from egm_lib.profile import Price, ProfileError, load_profile
from egm_lib.run import Run

PAID = "https://api.example.com/v1"


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """make_run(teacher, **curation): a run of the miniature's profile in tmp_path."""
    monkeypatch.setattr(Run, "root", property(lambda self: tmp_path / "run"))
    monkeypatch.delenv(stages.BUDGET_VARIABLE, raising=False)

    def make(asked, **curation):
        profile = load_profile("mini")
        data = dataclasses.replace(profile.data, root=str(tmp_path), eval_limit=None)
        judges = (teacher(asked.base_url, "a/judge"), teacher(asked.base_url, "another"))
        changed = dataclasses.replace(
            profile.curation, teacher=asked, judges=judges, limit=None, **curation
        )
        return Run(dataclasses.replace(profile, data=data, curation=changed), 0)

    return make


def test_a_stage_uses_the_profiles_settings(tmp_path, make_run):
    samples, run = make_root(tmp_path, 30), make_run(teacher())
    report = run_stage(run, "trace", samples)
    assert report.out == run.root / "curation" / "trace.jsonl" and report.out.is_file()
    # The miniature's traces list places: kept, since the profile skips that filter
    assert report.kept > 20 and "coordinates" not in report.dropped
    named = run_stage(run, "verify", samples, "train")
    assert named.out.name == "verify-train.jsonl" and named.dropped["rejected"] == 6
    assert (run.root / "curation" / "verify.ledger.jsonl").is_file()
    assert run_stage(run, "verify", samples[:10], "selection").asked == 0  # one ledger for a task


def test_every_judge_gets_every_failure(tmp_path, make_run):
    samples, run = make_root(tmp_path, 8), make_run(teacher())
    samples[3]["box"] = [0, 0, 0, 0]  # a legal answer
    assert judge_failures(run, "small-base", samples) == 16
    rows = read_jsonl(run.root / "failures" / "small-base.jsonl")
    assert {row["judge"] for row in rows} == {"a/judge", "another"}


@pytest.mark.parametrize("second", ["a/judge", "a_judge"])  # one model, and one file name
def test_judges_who_would_share_their_answers_are_refused(tmp_path, make_run, second):
    """The second would read the first's ledger, and the two would agree on everything."""
    samples, run = make_root(tmp_path, 2), make_run(teacher())
    judges = (*run.profile.curation.judges, teacher(run.profile.curation.teacher.base_url, second))
    curation = dataclasses.replace(run.profile.curation, judges=judges)
    run = Run(dataclasses.replace(run.profile, curation=curation), 0)
    with pytest.raises(ProfileError, match=f"'a/judge' and '{second}' would share their answers"):
        judge_failures(run, "small-base", samples)
    assert not run.root.exists()


def test_a_paid_service_without_a_budget_gets_no_request(tmp_path, make_run, monkeypatch):
    samples, run = make_root(tmp_path, 2), make_run(teacher(PAID))
    for ask in (
        lambda: run_stage(run, "trace", samples),
        lambda: judge_failures(run, "small-base", samples),
    ):
        with pytest.raises(CurationError, match="no budget: set curation.budget_usd"):
            ask()
    assert not run.root.exists()
    monkeypatch.setenv(stages.BUDGET_VARIABLE, "much")
    with pytest.raises(CurationError, match="give an amount"):
        run_stage(run, "trace", samples)


@pytest.mark.parametrize(
    "service, paid",
    [
        (teacher(), False),
        (teacher("http://localhost:8000/v1"), False),
        (teacher("http://node7:8000/v1", price_per_mtok=Price(prompt=0, completion=0)), False),
        (teacher("http://node7:8000/v1", price_per_mtok=None), True),  # nobody has said
        (teacher(PAID), True),
    ],
)
def test_which_services_are_paid(service, paid):
    assert is_paid(service) == paid


def test_the_budget_is_the_runs_and_not_each_tasks(tmp_path, make_run, monkeypatch):
    samples = make_root(tmp_path, 40)
    monkeypatch.setattr(stages, "is_paid", lambda service: True)
    monkeypatch.setenv(stages.BUDGET_VARIABLE, "1000")
    run = make_run(teacher())
    spent = run_stage(run, "verify", samples).cost_usd
    monkeypatch.setenv(stages.BUDGET_VARIABLE, str(spent))
    with pytest.raises(CurationError, match="trace: 40 samples are not asked yet.*budget"):
        run_stage(run, "trace", samples)


def test_a_stage_that_stopped_early_is_not_taken_for_finished(tmp_path, make_run, monkeypatch):
    """A notebook ends there, keeps what was paid, and goes on with a larger budget."""
    samples = make_root(tmp_path, 40)
    monkeypatch.setattr(stages, "is_paid", lambda service: True)
    monkeypatch.setenv(stages.BUDGET_VARIABLE, "1000")
    run = make_run(teacher())
    half = run_stage(run, "verify", samples[:20]).cost_usd
    monkeypatch.setenv(stages.BUDGET_VARIABLE, str(1.5 * half))
    with pytest.raises(CurationError, match="not asked yet.*run again with a larger one"):
        run_stage(run, "verify", samples)
    monkeypatch.setenv(stages.BUDGET_VARIABLE, "1000")
    report = run_stage(run, "verify", samples)
    assert 0 < report.asked <= 20 and report.waiting == 0


def test_the_estimate_counts_every_task_of_a_paid_run(tmp_path, make_run):
    samples = make_root(tmp_path, 12)
    amodal = samples
    vanilla = [{**sample, "task": "vanilla", "modal_box": None} for sample in samples]
    for sample in vanilla + amodal:
        sample.pop("box", None)
    for name, rows in (
        ("train", vanilla),
        ("train_amodal", amodal),
        ("selection_amodal", amodal),
    ):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    for dataset, split in eval_splits("vanilla"):
        rows = [{**sample, "dataset": dataset, "split": split} for sample in vanilla]
        write_jsonl(tmp_path / "eval" / f"{split_id(dataset, split)}.jsonl", rows)
    found = estimate_run(make_run(teacher(PAID)))
    counts = [(stage.task, stage.stage, stage.model) for stage in found.stages]
    service = "mini-teacher"
    assert counts == [
        ("trace", "train", service),
        ("amodal-expression", "train", service),
        ("amodal-expression", "selection", service),
        ("verify", "train", service),
        ("verify", "selection", service),
        ("amodal-trace", "train", service),
        ("failure", "small-base", "a/judge"),
        ("failure", "large-base", "a/judge"),
        ("failure", "small-base", "another"),
        ("failure", "large-base", "another"),
    ]
    assert [stage.cost.requests for stage in found.stages] == [12] * 6 + [round(0.15 * 96)] * 4
    assert found.complete and 0 < found.cost_usd < found.at_most_usd
    assert f"at most {found.at_most_usd:,.2f} USD" in str(found)
    assert not (tmp_path / "run").exists()  # it asks and writes nothing


def test_what_is_done_costs_nothing_more(tmp_path, make_run, monkeypatch):
    """Later steps are counted on the expressions that were written, not on the names before."""
    samples = [{**sample, "box": None} for sample in make_root(tmp_path, 12)]
    write_jsonl(tmp_path / "train_amodal.jsonl", [without_box(sample) for sample in samples])
    run = make_run(teacher())
    before = samples
    for task, field in (
        ("amodal-expression", "expression"),
        ("verify", "verdict"),
        ("amodal-trace", "reasoning"),
    ):
        out = run_stage(run, task, before, "train").out
        before = list(kept(before, out, field))
    for model in ("small-base", "large-base"):
        judge_failures(run, model, samples[:3])
    monkeypatch.setattr(stages, "is_paid", lambda service: True)
    left = {(s.task, s.stage): s.cost.requests for s in estimate_run(run).stages if s.cost}
    assert [task for task, _ in left if task == "failure"] == []
    done = ("amodal-expression", "verify", "amodal-trace")
    assert [left[task, "train"] for task in done] == [0, 0, 0]


def without_box(sample):
    return {name: value for name, value in sample.items() if name != "box"}


def test_an_estimate_without_data_or_paid_services(tmp_path, make_run):
    assert estimate_run(make_run(teacher())).stages == ()
    unknown = estimate_run(make_run(teacher(PAID)))
    assert not unknown.complete and "not prepared" in str(unknown)
