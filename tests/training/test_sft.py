"""SFT: the loss covers the answer only and equals TRL's; training survives an interruption."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from training_world import (
    VIDEOS,
    as_on_a_gpu,
    make_samples,
    moved_names,
    sft_options,
    store_model,
    stored,
)
from transformers import AutoConfig, TrainerCallback

from egm_lib import grpo, sft
from egm_lib.errors import InputError
from egm_lib.files import write_jsonl
from egm_lib.inference.loading import limit_pixels, load_processor, video_half
from egm_lib.model_shapes import shape_from_config
from egm_lib.profile import Lora, Model, load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.run import Run
from egm_lib.sft import answer_rows, make_sft_trainer, preview_batch, read_traces, run_sft
from egm_lib.sft import sft_options as trl_options
from egm_lib.training import model_setup
from egm_lib.training.checkpoints import is_finished, train_to, work_folder
from egm_lib.training.clock import Clock, TimedSchedule, logged_tokens
from egm_lib.training.command import stage_command
from egm_lib.training.model_setup import TrainingError, lora_config
from egm_lib.training.preflight import check_device, check_memory
from egm_lib.training.sft_trainers import ImageSampler, PlainCollator

FAMILY, INTERNVL = FAMILIES["qwen3-vl"], FAMILIES["internvl-3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return store_model(folder / "model"), make_samples(folder), folder


@pytest.fixture(scope="module")
def internvl_world(tmp_path_factory, world):
    return store_model(tmp_path_factory.mktemp("internvl"), "internvl-3"), *world[1:]


def trainer_of(
    world, tmp_path, *, shared: bool | None = None, reasoning: bool = True, family=FAMILY, **changes
):
    folder, samples, root = world
    model, processor = stored(folder, family.name)
    rows = answer_rows(samples, family, root, reasoning=reasoning)
    trainer = make_sft_trainer(
        model,
        processor,
        rows,
        family,
        sft_options(**changes),
        work=work_folder(tmp_path / "out"),
        log=tmp_path / "log.jsonl",
        seed=0,
        shared_prefix=shared,
    )
    return trainer, processor


def losses(log) -> list[float]:
    return [
        line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line
    ]


def test_the_loss_covers_the_answer_and_its_end_and_nothing_else(world, tmp_path):
    trainer, processor = trainer_of(world, tmp_path)
    batch = trainer.data_collator(list(trainer.train_dataset.select([0, 1, 2])))
    for row, sample in enumerate(world[1][:3]):
        box = (
            sample["gt_box"],
            (sample["width"], sample["height"]),
            sample["expression"],
            sample["reasoning"],
        )
        labels = batch["labels"][row]
        assert (
            processor.tokenizer.decode(labels[labels != -100]) == FAMILY.answer(*box) + "<|im_end|>"
        )
        prompt = processor.tokenizer.decode(batch["suffix"][row][labels == -100])
        assert FAMILY.prompt(sample["expression"], "vanilla") in prompt
    assert batch["group"].tolist() == [0, 0, 1]  # two questions of the first image share it


def test_internvl_s_loss_covers_the_answer_and_its_end_and_nothing_else(internvl_world, tmp_path):
    trainer, processor = trainer_of(internvl_world, tmp_path, family=INTERNVL)
    batch = trainer.data_collator(list(trainer.train_dataset.select([0, 2])))
    for row, sample in enumerate([internvl_world[1][0], internvl_world[1][2]]):
        box = (
            sample["gt_box"],
            (sample["width"], sample["height"]),
            sample["expression"],
            sample["reasoning"],
        )
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        assert (
            processor.tokenizer.decode(labels[labels != -100])
            == INTERNVL.answer(*box) + "<|im_end|>"
        )
        assert INTERNVL.prompt(sample["expression"], "vanilla") in processor.tokenizer.decode(
            ids[labels == -100]
        )
    image_tokens = (batch["input_ids"] == trainer.model.config.image_token_id).sum().item()
    assert image_tokens == 4 * len(batch["pixel_values"]) > 4 * 2  # several tiles an image


@pytest.mark.parametrize("shared", [True, False])
def test_an_answer_beyond_max_length_is_cut(world, tmp_path, shared):
    whole, processor = trainer_of(world, tmp_path, shared=shared)
    row = [whole.train_dataset[0]]

    def answer(trainer) -> list[int]:
        labels = trainer.data_collator(row)["labels"][0]
        return labels[labels != -100].tolist()

    ids = answer(whole)
    asked = len(PlainCollator(processor, None)(row)["input_ids"][0]) - len(ids)
    cut, _ = trainer_of(world, tmp_path, shared=shared, max_length=asked + 5)
    assert answer(cut) == ids[:5] != ids
    none_left, _ = trainer_of(world, tmp_path, shared=shared, max_length=asked)
    with pytest.raises(TrainingError, match=f"take {asked} tokens, but sft.max_length is {asked}"):
        answer(none_left)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("changes", [{}, {"lora": Lora(r=2, alpha=4)}], ids=["full", "lora"])
def test_shared_prefix_and_plain_trainer_give_the_same_losses(
    world, tmp_path, monkeypatch, changes, gpu
):
    if gpu:
        as_on_a_gpu(monkeypatch, sft)
    for name, shared in (("ours", True), ("trl", False)):
        (tmp_path / name).mkdir()
        trainer, processor = trainer_of(
            world, tmp_path / name, shared=shared, learning_rate=1e-3, **changes
        )
        trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(range(8))
        train_to(trainer, processor, tmp_path / name / "out")
    assert losses(tmp_path / "ours/log.jsonl") == pytest.approx(
        losses(tmp_path / "trl/log.jsonl"), abs=1e-4
    )


@pytest.mark.parametrize("family", [FAMILY, INTERNVL], ids=lambda family: family.name)
def test_eight_small_batches_equal_one_large(world, internvl_world, tmp_path, family):
    world = internvl_world if family is INTERNVL else world
    for name, batch, steps in (("large", 8, 1), ("small", 1, 8)):
        (tmp_path / name).mkdir()
        trainer, processor = trainer_of(
            world,
            tmp_path / name,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            family=family,
        )
        trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(range(8))
        train_to(trainer, processor, tmp_path / name / "out")
    assert losses(tmp_path / "large/log.jsonl") == pytest.approx(
        losses(tmp_path / "small/log.jsonl"), abs=1e-5
    )


def check_readable(out, family):
    """Others read it, vLLM first: it states transformers' own class, and of videos what its start
    states.
    """
    stated = json.loads((out / "processor_config.json").read_text())["processor_class"]
    assert getattr(transformers, stated).__module__.startswith("transformers.")
    assert video_half(out) == VIDEOS[family]


@pytest.mark.parametrize(
    ("merger", "lora", "moves"),
    [
        (True, None, ("language_model", "lm_head")),
        (False, None, ("language_model", "lm_head", "merger")),
        # Merged into the linear layers of the language model
        (True, Lora(r=2, alpha=4), ("_proj.weight",)),
    ],
)
def test_only_trainable_parameters_change(world, tmp_path, merger, lora, moves):
    trainer, processor = trainer_of(world, tmp_path, freeze_merger=merger, lora=lora)
    out = train_to(trainer, processor, tmp_path / "out")
    moved = moved_names(world[0], out)
    assert moved and all(any(part in name for part in moves) for name in moved)
    assert any("language_model.layers" in name for name in moved)
    assert not any("visual.blocks" in name or "patch_embed" in name for name in moved)
    check_readable(out, "qwen3-vl")


@pytest.mark.parametrize(
    ("merger", "lora", "moves"),
    [
        (True, None, ("language_model", "lm_head")),
        # As in the paper's profiles
        (False, None, ("language_model", "lm_head", "multi_modal_projector")),
        (True, Lora(r=2, alpha=4), ("_proj.weight",)),
    ],
)
def test_only_trainable_parameters_of_internvl_change(
    internvl_world, tmp_path, merger, lora, moves
):
    trainer, processor = trainer_of(
        internvl_world, tmp_path, family=INTERNVL, freeze_merger=merger, lora=lora
    )
    out = train_to(trainer, processor, tmp_path / "out")
    check_readable(out, "internvl-3")
    moved = moved_names(internvl_world[0], out)
    # Tied to the embeddings
    assert all(any(part in name for name in moved) for part in moves if part != "lm_head")
    assert all(any(part in name for part in moves) and "vision_tower" not in name for name in moved)


def test_a_killed_run_continues_to_the_same_losses(world, tmp_path):
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Killed

    options = {"max_steps": 6, "per_device_train_batch_size": 3, "lr_scheduler_type": "cosine"}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    trainer, processor = trainer_of(world, tmp_path / "whole", **options)
    train_to(trainer, processor, tmp_path / "whole/out")
    trainer, processor = trainer_of(world, tmp_path / "killed", **options)
    trainer.clock.save_seconds = 0.0  # a checkpoint after each step
    trainer.add_callback(Kill())
    with pytest.raises(Killed):
        train_to(trainer, processor, tmp_path / "killed/out")
    assert not is_finished(tmp_path / "killed/out")
    trainer, processor = trainer_of(world, tmp_path / "killed", **options)
    train_to(trainer, processor, tmp_path / "killed/out")
    # To the last bit
    assert losses(tmp_path / "killed/log.jsonl") == losses(tmp_path / "whole/log.jsonl")
    whole, killed = (
        stored(tmp_path / name / "out")[0].state_dict() for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert not work_folder(tmp_path / "killed/out").exists()


def test_the_clock_ends_a_run_and_its_schedule():
    clock = Clock(log=None, max_minutes=1.0)

    class Trainer(TimedSchedule):
        class args:
            warmup_steps, lr_scheduler_type, max_steps = 0, "cosine", -1

    trainer = Trainer()
    trainer.clock = clock
    trainer.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = trainer.create_scheduler(1_000_000)
    rates = []
    for seconds in (0, 30, 60):
        clock.before_s = seconds
        trainer.optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx([1.0, 0.5, 0.0], abs=0.01)
    assert clock.progress(0, 10) == 1.0


def test_rows_of_an_image_stand_together_and_every_row_occurs_once():
    images = [str(n % 10) for n in range(45)]
    sampler = ImageSampler(images, together=2, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(45)) and order == list(sampler)
    pairs = sum(images[a] == images[b] for a, b in zip(order, order[1:], strict=False))
    assert pairs >= 20  # 10 images, 4 or 5 rows each: two pairs an image
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_profile_values_become_trl_s_options(tmp_path):
    options = trl_options(
        sft_options(learning_rate=3e-4, warmup_ratio=0.03, dtype="bfloat16"), tmp_path, seed=5
    )
    assert {
        "learning_rate": 3e-4,
        "warmup_steps": 0.03,
        "bf16": True,
        "seed": 5,
    }.items() <= options.items()
    json.dumps(options)


def test_images_are_shrunk_to_the_profile_s_pixels(world):
    """SFT and GRPO shrink images to the profile's `max_pixels`.

    An image of 64 x 64 px has 16 merged patches.
    """
    folder, _, root = world
    for max_pixels, merged in ((None, 16), (1024, 4), (512, 1)):
        start = Model(path=str(folder), family="qwen3-vl", dtype="float32", max_pixels=max_pixels)
        images = model_setup.load_start(start.location, start, "float32")[1].image_processor
        grid = images([Image.open(root / "0.png")], return_tensors="pt")["image_grid_thw"][0]
        assert grid.prod() == 4 * merged


def test_missing_and_empty_traces_are_reported_in_one_sentence(tmp_path):
    with pytest.raises(TrainingError, match="is missing: run notebook 02"):
        read_traces(tmp_path / "none.jsonl", tmp_path, "vanilla")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TrainingError, match="holds no trace"):
        read_traces(tmp_path / "empty.jsonl", tmp_path, "vanilla")


def test_a_row_that_is_no_trace_is_left_out(tmp_path, monkeypatch):
    """Whole traces stay, and bare ones are joined, whatever stands between them."""
    samples = [{"sample_id": str(number), "gt_box": [0, 0, 9, 9]} for number in range(3)]
    monkeypatch.setattr(sft, "read_train", lambda *args: samples)
    whole = {**samples[2], "reasoning": "so"}
    odd = [{"sample_id": "1"}, {"reasoning": "so"}, {"sample_id": [], "reasoning": "so"}]
    # No answer can be made of these
    odd += [{**whole, "reasoning": text} for text in (" ", "a <ref>cup</ref>", "b</think>c")]
    odd += [{**whole, "expression": text} for text in ("the <answer> cup", None)]
    unknown = {"sample_id": "9", "reasoning": "so"}
    bare = [{"sample_id": 0, "reasoning": "so"}, {"sample_id": "1", "reasoning": "so"}]
    write_jsonl(tmp_path / "traces.jsonl", [odd[0], bare[0], *odd, unknown, whole, bare[1]])
    traces = read_traces(tmp_path / "traces.jsonl", tmp_path, "vanilla")
    assert [str(trace["sample_id"]) for trace in traces] == ["0", "2", "1"]
    assert all(trace["gt_box"] and trace["reasoning"] == "so" for trace in traces)


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_half_precision_without_a_gpu_is_reported_before_anything_starts():
    check_device("float32", "sft")
    with pytest.raises(
        TrainingError, match="sft.dtype is 'bfloat16', and PyTorch sees no GPU here"
    ):
        check_device("bfloat16", "sft")


def test_a_gpu_too_small_for_the_optimizer_is_reported_before_anything_is_loaded(
    world, monkeypatch
):
    profile, place = load_profile("paper-qwen3vl-8b"), str(world[0])
    shape = shape_from_config(AutoConfig.from_pretrained(place))
    trained = shape.parameters - shape.vision.tower
    # ZeRO-3: weights and gradients in bfloat16; master weights and two moments in float32
    needed = shape.parameters * 2 + trained * (4 + 8 + 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for total_memory, processes, refused in (
        (needed, 1, False),
        (needed - 1, 1, True),
        (needed // 2 + 1, 2, False),
    ):
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda _, n=total_memory: SimpleNamespace(total_memory=n),
        )
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        with pytest.raises(TrainingError, match="more GPUs") if refused else nullcontext():
            check_memory(profile, "sft", place)


@pytest.mark.parametrize(("share", "refused"), [(0.3, False), (0.001, True)])
def test_a_share_too_small_for_a_colocated_vllm_is_reported_before_anything_is_loaded(
    world, monkeypatch, share, refused
):
    base, place = load_profile("paper-qwen3vl-8b"), str(world[0])
    profile = replace(base, grpo=replace(base.grpo, vllm_gpu_memory_utilization=share))
    memory = 100 * shape_from_config(AutoConfig.from_pretrained(place)).parameters
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory)
    )
    with (
        pytest.raises(TrainingError, match="raise grpo.vllm_gpu_memory_utilization")
        if refused
        else nullcontext()
    ):
        check_memory(profile, "grpo", place)


@pytest.mark.parametrize("stage", [sft, grpo])
def test_memory_is_checked_before_anything_else(stage, monkeypatch, tmp_path, capsys):
    def refuse(*args):
        raise TrainingError("no room")

    monkeypatch.setattr(Run, "root", property(lambda run: tmp_path))
    monkeypatch.setattr(stage, "check_memory", refuse)
    if stage is grpo:
        monkeypatch.setattr(grpo, "require_checkpoint", lambda *args: tmp_path)
    assert stage.main(["--profile", "mini"]) == 2
    assert capsys.readouterr().err == "no room\n"


def test_a_gated_model_is_reported_in_one_sentence(monkeypatch):
    def gated(*args, **kwargs):
        raise OSError(
            "You are trying to access a gated repo.\nMake sure to have access to it at ..."
        )

    monkeypatch.setattr(model_setup, "load_model", gated)
    small = load_profile("paper-qwen3vl-2b").models.small
    with pytest.raises(
        TrainingError,
        match="Qwen3-VL-2B-Thinking cannot be loaded: .* gated repo. .* `hf auth login`",
    ):
        model_setup.load_start(small.path, small, "float32")


def test_too_little_memory_is_reported_in_one_sentence(capsys):
    def full(run, args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    assert stage_command("sft", "", ["--profile", "smoke"], full) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("The GPU has too little memory: CUDA out of memory.")
        and said.count("\n") == 1
    )


def test_training_lowers_the_loss(world, tmp_path):
    trainer, processor = trainer_of(world, tmp_path, max_steps=12)
    train_to(trainer, processor, tmp_path / "out")
    values = losses(tmp_path / "log.jsonl")
    assert values[-1] < 0.7 * values[0] and all(map(math.isfinite, values))


def traces_run(world, tmp_path, monkeypatch, **changes) -> Run:
    """A run of the smoke profile that trains the tiny model on the world's traces."""
    folder, samples, root = world
    base = load_profile("smoke")
    small = replace(base.models.small, path=str(folder))
    profile = replace(
        base,
        models=replace(base.models, small=small),
        data=replace(base.data, root=str(root)),
        sft=sft_options(**changes),
    )
    monkeypatch.setattr(Run, "root", property(lambda run: tmp_path / "run"))
    run = Run(profile, 0)
    write_jsonl(run.traces("vanilla"), samples)
    return run


@pytest.mark.parametrize("limits", ["sft", "model"])
def test_a_profile_s_pixel_limits_are_not_stored_in_a_checkpoint(
    world, tmp_path, monkeypatch, limits
):
    """Otherwise everyone who loads the model later would answer with smaller images."""
    seen = []
    collate = PlainCollator.__call__
    monkeypatch.setattr(
        PlainCollator,
        "__call__",
        lambda self, rows: seen.append(collate(self, rows)) or seen[-1],
    )
    monkeypatch.setattr(sft, "can_share_prefix", lambda *args: False)
    run = traces_run(world, tmp_path, monkeypatch, max_pixels=1024 if limits == "sft" else None)
    models = run.profile.models
    small = replace(models.small, max_pixels=1024 if limits == "model" else None)
    run = replace(run, profile=replace(run.profile, models=replace(models, small=small)))
    out = run_sft(run, "vanilla")
    assert {int(grid.prod()) for batch in seen for grid in batch["image_grid_thw"]} == {4 * 4}
    start, made = (
        load_processor(place, "qwen3-vl").image_processor.size for place in (world[0], out)
    )
    assert made == start


def test_no_image_is_enlarged(world):
    """An image below the limit keeps its size; the authors' least is one token too."""
    processor = load_processor(world[0], "qwen3-vl")
    limit_pixels(processor, FAMILY.name, 50_176)
    grid = processor.image_processor([Image.new("RGB", (16, 32))], return_tensors="pt")
    assert grid["image_grid_thw"][0].tolist() == [1, 4, 2]
    with pytest.raises(InputError, match="for Qwen3-VL"):
        limit_pixels(processor, "internvl-3", 50_176)


def test_a_preview_needs_no_trainer(world, tmp_path, monkeypatch):
    run = traces_run(world, tmp_path, monkeypatch)
    monkeypatch.setattr(sft, "load_start", None)  # no model is loaded
    batch, tokenizer = preview_batch(run, "vanilla")
    labels = batch["labels"][0]
    text = tokenizer.decode(labels[labels != -100])
    assert text.startswith(world[1][0]["reasoning"]) and text.endswith("<|im_end|>")


@pytest.mark.parametrize("control", ["direct", "sft"])
def test_a_control_gets_the_tokens_of_what_it_is_compared_with(
    world, tmp_path, monkeypatch, capsys, control
):
    run = traces_run(world, tmp_path, monkeypatch)
    run_sft(run, "vanilla")
    tokens = {"sft": logged_tokens(run.log("sft-vanilla.jsonl")), "grpo": 20_000}
    write_jsonl(
        run.log("grpo-vanilla.jsonl"),
        [{"step": 1, "elapsed_s": 2.0, "num_tokens": tokens["grpo"]}],
    )
    run_sft(run, "vanilla", control=control)
    budget = sum(tokens.values()) if control == "direct" else tokens["grpo"]
    spent = logged_tokens(run.log(f"sft-control-{control}-vanilla.jsonl"))
    assert spent == pytest.approx(budget, rel=0.05)
    stated = capsys.readouterr().out
    assert f"{tokens['grpo']:,} of grpo" in stated and "steps x" in stated


def test_both_trainers_count_the_same_tokens_also_across_an_interruption(world, tmp_path):
    counts = []
    for name, shared in (("ours", True), ("trl", False)):
        (tmp_path / name).mkdir()
        trainer, processor = trainer_of(
            world, tmp_path / name, shared=shared, max_steps=4, per_device_train_batch_size=8
        )
        train_to(trainer, processor, tmp_path / name / "out")
        counts.append(logged_tokens(tmp_path / name / "log.jsonl"))
    assert counts[0] == counts[1] > 0


def test_decoding_in_other_processes_changes_nothing(world, tmp_path):
    for name, workers in (("none", 0), ("two", 2)):
        (tmp_path / name).mkdir()
        trainer, processor = trainer_of(
            world, tmp_path / name, shared=False, dataloader_num_workers=workers
        )
        assert trainer.get_train_dataloader().num_workers == workers
        train_to(trainer, processor, tmp_path / name / "out")
    assert losses(tmp_path / "none/log.jsonl") == losses(tmp_path / "two/log.jsonl")


def test_lora_on_divided_weights_is_refused(monkeypatch):
    """What is merged there would be a piece of each weight."""
    lora_config(Lora(r=2, alpha=4))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(TrainingError, match="LoRA cannot be combined with ZeRO-3"):
        lora_config(Lora(r=2, alpha=4))


def test_steps_set_the_schedule_and_minutes_only_limit_it(world, tmp_path):
    """Else the learning rate, and so the weights, depend on how fast the machine is."""
    trainer, _ = trainer_of(
        world, tmp_path, max_steps=10, max_minutes=0.001, lr_scheduler_type="linear"
    )
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10)
    trainer.clock.before_s = 3600.0
    trainer.optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.9e-2)
