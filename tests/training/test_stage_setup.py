"""The two trainings of a run, from its files to the finished model, as the commands start them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import distributed
from training_world import grpo_options, make_samples, sft_options, store_model
from transformers import TrainingArguments

from egm_lib import grpo, sft
from egm_lib.data import write_samples
from egm_lib.files import write_jsonl
from egm_lib.grpo import grpo_config, run_grpo
from egm_lib.inference.loading import load_processor
from egm_lib.pipeline import ablations
from egm_lib.profile import Lora, load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.run import Run
from egm_lib.sft import run_sft, sft_config

FAMILY = FAMILIES["qwen3-vl"]
RUNS: dict[str, Callable] = {"sft": run_sft, "grpo": run_grpo}
MODULES = {"sft": sft, "grpo": grpo}
both = pytest.mark.parametrize("stage", list(RUNS))


@pytest.fixture
def start(tmp_path, monkeypatch) -> Callable[..., Run]:
    """start(stage, **options): a run whose stage takes one step from a tiny model."""
    samples = make_samples(tmp_path / "data", images=4, per_image=1)
    monkeypatch.setattr(Run, "root", property(lambda run: tmp_path / "run"))

    def make(stage: str, max_pixels: int | None = None, **options) -> Run:
        base, section = load_profile("smoke"), {"sft": sft_options, "grpo": grpo_options}[stage]
        folder = tmp_path / "model"
        small = replace(base.models.small, path=str(folder), max_pixels=max_pixels)
        profile = replace(
            base,
            models=replace(base.models, small=small),
            data=replace(base.data, root=str(tmp_path / "data")),
            **{stage: section(**{"max_steps": 1} | options)},
        )
        run = Run(profile, 0)
        store_model(folder if stage == "sft" else run.checkpoint("vanilla", "small-sft"))
        write_jsonl(run.traces("vanilla"), samples)
        added = {"dataset": "refcoco", "split": "selection", "flipped": False}
        rows = [sample | added for sample in samples]
        for row in rows:
            del row["reasoning"]
        write_samples(run.samples("rl_vanilla"), rows)
        return run

    return make


def stored_dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118


def test_the_limit_of_a_start_is_not_stored_by_grpo(start):
    """Otherwise everyone who loads the model later would answer with smaller images."""
    out = run_grpo(start("grpo", max_pixels=1024), "vanilla")
    limited = load_processor(out, FAMILY.name, max_pixels=1024).image_processor.size
    made = load_processor(out, FAMILY.name).image_processor.size
    assert made["longest_edge"] > limited["longest_edge"] == 1024


@both
@pytest.mark.parametrize(("lora", "dtype"), [(None, "F32"), (Lora(r=2, alpha=4), "BF16")])
def test_full_training_keeps_float32_weights_whatever_the_profile_computes_in(
    start, monkeypatch, stage, lora, dtype
):
    """In bfloat16 an update of 1e-6 of a weight of 0.02 is lost. LoRA's base does not move."""
    monkeypatch.setattr(MODULES[stage], "check_device", lambda *args: None)  # as on a GPU
    options = {"compute_dtype": "float32"} if stage == "grpo" else {}
    run = start(stage, dtype="bfloat16", lora=lora, **options)
    assert stored_dtypes(RUNS[stage](run, "vanilla")) == {dtype}


@both
def test_the_model_reads_the_profile_s_prompt(start, monkeypatch, stage):
    run = start(stage, prompt="qwen-refcoco")
    seen: list[str] = []
    load = MODULES[stage].load_start

    def listened(*args):
        model, processor = load(*args)

        def listen(module, args, kwargs) -> None:
            ids = args[0] if args else kwargs["input"]
            seen.extend(processor.tokenizer.batch_decode(ids))

        model.get_input_embeddings().register_forward_pre_hook(listen, with_kwargs=True)
        return model, processor

    monkeypatch.setattr(MODULES[stage], "load_start", listened)
    RUNS[stage](run, "vanilla")
    asked = FAMILY.prompt("square 0", "vanilla", name="qwen-refcoco")
    assert sum(f"{asked}<|im_end|>" in text for text in seen) >= 4  # one for each image
    assert not any("Locate square 0" in text for text in seen)  # the default


@both
def test_what_trl_refuses_is_refused_before_a_model_is_loaded(start, monkeypatch, stage):
    """TRL's configuration comes first: DeepSpeed then divides weights while they are loaded."""
    run = start(stage, lr_scheduler_type="unheard-of")
    monkeypatch.setattr(MODULES[stage], "load_start", lambda *args: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="unheard-of"):
        RUNS[stage](run, "vanilla")


@pytest.mark.parametrize(
    ("configure", "options"), [(sft_config, sft_options()), (grpo_config, grpo_options())]
)
def test_one_process_that_sees_several_gpus_uses_one(tmp_path, monkeypatch, configure, options):
    """With two, transformers would use DataParallel, which TRL refuses with a ValueError."""

    setup = vars(TrainingArguments)["_setup_devices"].func

    def two_gpus(config) -> torch.device:
        device = setup(config)
        config._n_gpu = 2
        return device

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(two_gpus))
    assert configure(options, tmp_path, 0).n_gpu == 1


@pytest.fixture
def group(tmp_path):
    """A group of processes that has this one alone."""
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize("module", ["sft", "grpo", "ablations"])
def test_a_training_ends_together_with_its_group(group, monkeypatch, module):
    """However it is started: a process that leaves early makes the launcher end the others."""
    monkeypatch.setattr(sft, "run_sft", lambda *args, **options: "trained")
    for owner in (grpo, ablations):
        monkeypatch.setattr(owner, "run_grpo", lambda *args, **options: "trained")
    variant = ["--train", "without-kl"] if module == "ablations" else []
    main = {"sft": sft, "grpo": grpo, "ablations": ablations}[module].main
    assert main(["--profile", "smoke", *variant]) == 0
    assert not distributed.is_initialized()
