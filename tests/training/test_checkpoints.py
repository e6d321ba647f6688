"""Checkpoints: only whole ones count, a full disk ends nothing, and ranks do as rank 0 decides."""

import json
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ports import use_free_port
from torch import distributed, multiprocessing
from training_world import make_samples, moved_names, sft_options, store_model, stored

from egm_lib.profile import Lora
from egm_lib.prompts import FAMILIES
from egm_lib.sft import answer_rows, make_sft_trainer
from egm_lib.training import checkpoints, ranks
from egm_lib.training.checkpoints import (
    COMPLETE,
    CONTINUES,
    checkpoint_bytes,
    is_finished,
    last_complete,
    make_room,
    mark_complete,
    train_to,
    work_folder,
)
from egm_lib.training.clock import Clock

FAMILY = FAMILIES["qwen3-vl"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return store_model(folder / "model"), make_samples(folder), folder


def trainer_of(world, out, **changes):
    model, processor = stored(world[0])
    return make_sft_trainer(
        model,
        processor,
        answer_rows(world[1], FAMILY, world[2], reasoning=True),
        FAMILY,
        sft_options(**changes),
        work=work_folder(out),
        log=out.with_name("log.jsonl"),
        seed=0,
    ), processor


def test_a_checkpoint_that_was_not_written_to_its_end_is_dropped(tmp_path):
    for step in (3, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-3" / COMPLETE).touch()
    (tmp_path / "checkpoint-20" / COMPLETE).touch()
    assert last_complete(tmp_path).name == "checkpoint-20"
    assert not (tmp_path / "checkpoint-100").exists()
    assert last_complete(tmp_path / "none") is None


def test_a_kill_while_saving_costs_the_steps_since_the_last_checkpoint(world, tmp_path, capsys):
    """transformers' own choice is the highest folder, which cannot be loaded."""
    out = tmp_path / "out"
    trainer, processor = trainer_of(world, out, max_steps=6)
    trainer.clock.save_seconds = 0.0
    save = trainer._save_optimizer_and_scheduler

    def killed_at_4(folder):
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        save(folder)

    trainer._save_optimizer_and_scheduler = killed_at_4
    with pytest.raises(KeyboardInterrupt):
        train_to(trainer, processor, out)
    names = sorted(folder.name for folder in work_folder(out).glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-4"]
    trainer, processor = trainer_of(world, out, max_steps=6)
    assert CONTINUES not in capsys.readouterr().out
    train_to(trainer, processor, out)
    assert f"{CONTINUES} {work_folder(out) / 'checkpoint-3'}\n" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6] and trainer.state.global_step == 6
    assert not work_folder(out).exists()


def test_the_older_checkpoint_goes_when_the_next_is_whole(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        assert (tmp_path / "checkpoint-1").exists()
        mark_complete(tmp_path, step)
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("free", "saved", "left"),
    [
        (3000, True, ["checkpoint-1"]),  # room for both
        (800, True, []),  # for one
        (100, False, ["checkpoint-1"]),  # for none: what is there stays
    ],
)
def test_a_full_disk_does_not_end_a_training(tmp_path, monkeypatch, capsys, free, saved, left):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free))
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "weights").write_bytes(bytes(800))
    model = torch.nn.Linear(10, 10, bias=False)  # 100 parameters of 14 bytes
    assert make_room(tmp_path, model) is saved
    assert [folder.name for folder in tmp_path.iterdir()] == left
    assert capsys.readouterr().out.count("\n") == (free < 1400)


def test_room_is_made_for_all_of_a_model_that_is_divided(tmp_path):
    """ZeRO-3 leaves a process with a part, or nothing, of each parameter."""
    model = torch.nn.Linear(10, 10, bias=False)
    whole = checkpoint_bytes(model)
    model.weight.ds_numel = model.weight.numel()
    model.weight.data = torch.empty(0)
    assert checkpoint_bytes(model) == whole == 100 * 14


def test_the_time_between_checkpoints_counts_from_the_end_of_a_save(tmp_path, monkeypatch):
    """Else a save that takes longer than that time is followed by the next at once."""
    now = [0.0]
    monkeypatch.setattr("egm_lib.training.clock.time.monotonic", lambda: now[0])
    clock = Clock(tmp_path / "log.jsonl", save_seconds=60)
    args = SimpleNamespace(output_dir=str(tmp_path), device="cpu")
    state = SimpleNamespace(global_step=0)
    model = torch.nn.Linear(1, 1)

    def saves(after_s: float) -> bool:
        now[0] += after_s
        control = SimpleNamespace(should_save=False)
        clock.on_step_end(args, state, control, model=model)
        return control.should_save

    clock.on_train_begin(args, state, None)
    assert not saves(59) and saves(1)
    now[0] += 100  # the save itself
    (tmp_path / "checkpoint-0").mkdir()
    clock.on_save(args, state, None)
    assert not saves(1) and saves(59)


def test_a_log_with_a_torn_last_line_is_continued(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(
        b'{"step": 1, "elapsed_s": 5.0}\n{"loss": 1}\n{"step": 2, "elapsed_s": 9.0, "x\xc3'
    )
    clock = Clock(log)
    args, state = SimpleNamespace(device="cpu"), SimpleNamespace(global_step=2)
    clock.on_train_begin(args, state, None)
    assert clock.before_s == 5.0
    assert log.read_text() == '{"step": 1, "elapsed_s": 5.0}\n'


def _clock_of(rank: int, folder: Path) -> list:
    """What a rank's clock decides. By its own time, one rank would save and the other stop."""
    clock = Clock(folder / str(rank) / "clock.jsonl", max_minutes=1, save_seconds=50)
    args = SimpleNamespace(output_dir=str(folder), device="cpu")
    state, control = SimpleNamespace(global_step=1), SimpleNamespace()
    clock.on_train_begin(args, state, control)
    before_s = clock.before_s
    control.should_training_stop = control.should_save = False
    clock.began -= (50, 65)[rank]
    clock.saved -= (55, 0)[rank]
    clock.on_step_end(args, state, control, model=torch.nn.Linear(1, 1))
    return [before_s, control.should_training_stop, control.should_save, clock.elapsed_s]


def _rank(rank: int, folder: str) -> None:
    """One of two processes. Each has a folder of its own, so that its files tell what it did."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    root = Path(folder)
    out, first = root / str(rank) / "out", root / "0" / "out"
    seen = {"clock": _clock_of(rank, root)}
    samples = json.loads((root / "samples.json").read_text())
    trainer, processor = trainer_of(
        (root / "model", samples, root), out, lora=Lora(r=2, alpha=4), max_steps=1
    )
    save = checkpoints.save_processor

    def slow(*args):
        time.sleep(2)
        save(*args)

    checkpoints.save_processor = slow
    train_to(trainer, processor, out)
    seen["finished"] = is_finished(first)
    if rank == 0:
        time.sleep(2)
        (root / "last words").touch()
    ranks.leave()
    seen["heard"] = (root / "last words").exists()
    seen["grouped"] = distributed.is_initialized()
    (root / f"{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[dict, dict, Path]:
    """What rank 0 and rank 1 of a training with LoRA saw, and the folder of their files."""
    root = tmp_path_factory.mktemp("ranks")
    store_model(root / "model")
    (root / "samples.json").write_text(json.dumps(make_samples(root)))
    (root / "0").mkdir()
    (root / "0" / "clock.jsonl").write_text('{"step": 1, "elapsed_s": 5.0}\n')
    with pytest.MonkeyPatch.context() as patch:
        use_free_port(patch)
        multiprocessing.spawn(_rank, (str(root),), nprocs=2)
    first, second = (json.loads((root / f"{rank}.json").read_text()) for rank in (0, 1))
    return first, second, root


def test_rank_0_decides_for_all_when_to_save_and_when_to_stop(two_ranks):
    first, second, _ = two_ranks
    assert first["clock"] == second["clock"] and first["clock"][1:3] == [False, True]


def test_rank_0_alone_opens_the_log_and_tells_the_others_what_it_says(two_ranks):
    """Ranks that write one temporary file at the same time take it from each other."""
    first, second, root = two_ranks
    assert first["clock"][0] == second["clock"][0] == 5.0
    assert (root / "0" / "clock.jsonl").read_text().count("\n") == 1
    assert not list((root / "1").rglob("*.jsonl"))


def test_rank_0_alone_merges_lora(two_ranks):
    """Two that write the same file at the same time leave neither's."""
    root = two_ranks[2]
    moved = moved_names(root / "model", root / "0" / "out")
    assert moved and all(name.endswith("_proj.weight") for name in moved)
    assert not list((root / "1").rglob("*.safetensors"))


def test_no_rank_ends_before_the_others(two_ranks):
    """The launcher ends a job whose first process has ended, though a model is being moved."""
    for seen in two_ranks[:2]:
        assert seen["finished"] and seen["heard"] and not seen["grouped"]


def test_two_trainings_give_the_same_weights(world, tmp_path):
    """Budgets in steps: nothing depends on how fast the machine is."""
    made = []
    for name in ("once", "again"):
        out = tmp_path / name / "out"
        out.parent.mkdir()
        trainer, processor = trainer_of(
            world, out, max_steps=3, max_minutes=1000, lr_scheduler_type="cosine"
        )
        train_to(trainer, processor, out)
        made.append(stored(out)[0].state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(
        made[0]["lm_head.weight"], stored(world[0])[0].state_dict()["lm_head.weight"]
    )
