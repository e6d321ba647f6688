"""Will it fit, and how long will it take? A profile's SFT and GRPO, before they start.

    python -m egm_lib.training.plan --profile paper-qwen3vl-8b                 # on 8 A100 of 80 GB
    python -m egm_lib.training.plan --profile paper-internvl3-8b --gpu h100 --gpus 16

Prints memory of one GPU in each phase of a step, disk, host memory and hours, each with its
arithmetic. No weights are loaded and nothing is downloaded: shapes come from the model's folder, or
from the table of `egm_lib.model_shapes`. Weights and optimizer states are exact. The rest is an
estimate, which `benchmarks/bench_plan.py` compares with measured peaks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import yaml

import egm_lib
from egm_lib.cli import ends
from egm_lib.files import read_json
from egm_lib.inference.loading import load_config
from egm_lib.mini.scenes import SIZE_PX
from egm_lib.model_shapes import ModelShape, QwenVision, shape_from_config, shape_of
from egm_lib.profile import Model, Profile, load_profile
from egm_lib.prompts import FAMILIES, TASKS, Task
from egm_lib.training import plan_work
from egm_lib.training.hardware import DEVICES, GIB, Hardware, PlanError, hardware
from egm_lib.training.model_setup import can_share_prefix
from egm_lib.training.plan_memory import (
    ALL,
    ZERO_DEFAULTS,
    Part,
    Row,
    Setting,
    Sharding,
    fullest,
    memory_parts,
    total_bytes,
    vllm_need,
)

STAGES = ("sft", "grpo")
CONFIGS = Path(egm_lib.__file__).parent / "pipeline" / "configs"
FREE_SHARE = 0.1  # ours: of a GPU's memory, for what the allocator cannot use
# The commonest size of COCO; its ratio makes the most tiles of InternVL-3
IMAGE_WH = (640, 480)
MINI_WH = (SIZE_PX, SIZE_PX)
QUESTION_TOKENS = 48  # ours: the chat template, a prompt of Fig. 7 and an expression
ANSWER_TOKENS = 100  # EGM-8B's mean is 101 (the paper's first figure)
LONGEST_SFT = 2  # ours: the longest answer of a batch, in means
SFT_SAMPLES: Mapping[Task, int] = {"vanilla": 575_208, "amodal": 23_698}  # Table 3
RL_SAMPLES = {  # Table 7
    "InternVL3-1B": 100_600,
    "InternVL3-2B": 63_887,
    "InternVL3-8B": 37_574,
    "Qwen3-VL-2B": 111_093,
    "Qwen3-VL-4B": 79_319,
    "Qwen3-VL-8B": 83_989,
}


@dataclass(frozen=True)
class Plan:
    """What one stage needs. parts: memory of one GPU."""

    stage: str
    setting: Setting
    samples: int

    @property
    def parts(self) -> list[Part]:
        return memory_parts(self.setting)

    @property
    def peak_gib(self) -> float:
        return total_bytes(self.parts, fullest(self.parts)) / GIB

    @property
    def vllm_fits(self) -> bool:
        """Whether a colocated vLLM's share holds its weights and one whole context."""
        if getattr(self.setting.options, "rollout", None) != "vllm-colocate":
            return True
        need, share = vllm_need(self.setting)
        return need <= share

    @property
    def fits(self) -> bool:
        limit_gib = (1 - FREE_SHARE) * self.setting.hardware.device.memory_gib
        return self.vllm_fits and self.peak_gib <= limit_gib

    def as_dict(self) -> dict[str, object]:
        phases = {phase: total_bytes(self.parts, phase) / GIB for phase in ALL}
        setting = self.setting
        return {
            "stage": self.stage,
            "hardware": str(setting.hardware),
            "parameters": setting.shape.parameters,
            "trained_parameters": setting.trained,
            "row_tokens": asdict(setting.row),
            "tokens_of_a_pass": setting.tokens,
            "memory": [asdict(part) for part in self.parts],
            "phases_gib": phases,
            "peak_gib": self.peak_gib,
            "fits": self.fits,
            "steps": plan_work.steps_of(setting, self.samples),
            "hours": [asdict(amount) for amount in plan_work.hours(setting, self.samples)],
            "disk": [asdict(amount) for amount in plan_work.disk(setting)],
            "host": asdict(plan_work.host(setting)),
        }


def model_shape(model: Model) -> ModelShape:
    """The shape of a profile's model, from its folder or from the table of public models."""
    folder = Path(model.location)
    if not (folder / "config.json").is_file():
        return shape_of(model.path)
    shape = shape_from_config(load_config(folder))
    size = _image_size(folder)
    if not isinstance(shape.vision, QwenVision) or "shortest_edge" not in size:
        return shape
    least, most = size["shortest_edge"], size["longest_edge"]
    return replace(shape, vision=replace(shape.vision, min_pixels=least, max_pixels=most))


def _image_size(folder: Path) -> dict:
    """`size` of a checkpoint's image processor; empty where it states none."""
    stated = read_json(folder / "processor_config.json", shape=dict) or {}
    images = stated.get("image_processor") or read_json(
        folder / "preprocessor_config.json", shape=dict
    )
    return (images or {}).get("size") or {}


def sharding_of(accelerate_config: str | None) -> Sharding:
    """How a file of egm_lib/pipeline/configs divides a model; None: it is not divided.

    Raises PlanError for a way that the plan does not know.
    """
    if accelerate_config is None:
        return Sharding()
    path = CONFIGS / f"{accelerate_config}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    stated = config.get("deepspeed_config", {})
    if config["distributed_type"] != "DEEPSPEED" or stated.get("zero_stage") != 3:
        raise PlanError(f"{path.name}: a plan can be made for ZeRO-3, and this is another way.")
    return Sharding(
        kind="zero-3",
        offload_optimizer=stated.get("offload_optimizer_device", "none") != "none",
        offload_weights=stated.get("offload_param_device", "none") != "none",
        zero={name: stated.get(name, size) for name, size in ZERO_DEFAULTS.items()},
    )


def row_of(
    profile: Profile, stage: str, shape: ModelShape, image_wh: tuple[int, int] | None = None
) -> Row:
    """Tokens of a row of the stage, the image's as the family's own processor makes them.

    image_wh: px; None: a common one of the profile's data.
    """
    options, small = getattr(profile, stage), profile.models.small
    image_wh = image_wh or (MINI_WH if profile.data.source == "mini" else IMAGE_WH)
    limits = (small.max_pixels, getattr(options, "max_pixels", None))
    max_pixels = min((limit for limit in limits if limit is not None), default=None)
    longest = getattr(options, "max_completion_length", LONGEST_SFT * ANSWER_TOKENS)
    return Row(
        image=shape.vision.image_tokens(*image_wh, max_pixels),
        question=QUESTION_TOKENS,
        answer=min(ANSWER_TOKENS, longest),
        longest=longest,
    )


def make_setting(
    profile: Profile,
    stage: str,
    on: Hardware,
    *,
    shape: ModelShape | None = None,
    row: Row | None = None,
    shared_prefix: bool | None = None,
) -> Setting:
    """All that decides what a stage needs. shape, row: other than the profile's.

    shared_prefix None: where it is possible.
    Raises PlanError for a training that would be refused.
    """
    options, launch = getattr(profile, stage), profile.launch
    sharding = sharding_of(launch.accelerate_config)
    if on.count > 1 and sharding.kind == "none":
        raise PlanError(
            f"{profile.name} starts one process (launch.accelerate_config is null), but the plan "
            f"is for {on.count} GPUs: leave --gpus out, or set launch.accelerate_config."
        )
    if options.lora and sharding.kind != "none":
        raise PlanError(
            f"{profile.name}.{stage}.lora cannot be combined with {sharding.kind} here: set "
            "launch.accelerate_config to null, or train without lora."
        )
    compute = getattr(options, "compute_dtype", None) or options.dtype
    if not on.device.is_gpu and compute != "float32":
        raise PlanError(f"{profile.name}.{stage} computes in {compute}, which needs a GPU.")
    shape = shape or model_shape(profile.models.small)
    if shared_prefix is None:
        family = FAMILIES[profile.models.small.family]
        divided = None if sharding.kind == "none" else sharding
        config = SimpleNamespace(world_size=on.count, deepspeed_plugin=divided)
        auto = getattr(options, "shared_prefix", "auto") == "auto"
        shared_prefix = auto and can_share_prefix(family, options, config)
    return Setting(
        options=options,
        shape=shape,
        row=row or row_of(profile, stage, shape),
        hardware=on,
        sharding=sharding,
        shared_prefix=shared_prefix,
    )


def samples_of(profile: Profile, stage: str, task: Task, shape: ModelShape) -> int:
    """Rows that a stage trains on: the profile's limit, or the paper's numbers."""
    data = profile.data
    if stage == "sft":
        limit = data.train_amodal_limit if task == "amodal" else data.train_limit
        return min(limit or SFT_SAMPLES[task], SFT_SAMPLES[task])
    limit = data.selection_amodal_limit if task == "amodal" else data.selection_limit
    paper = RL_SAMPLES.get(shape.name, RL_SAMPLES["Qwen3-VL-8B"])
    every = SFT_SAMPLES["amodal"] if task == "amodal" else paper  # Sec. 4.2
    return min(limit or every, every)


def make_plan(
    profile: Profile,
    stage: str,
    on: Hardware,
    *,
    task: Task = "vanilla",
    image_wh: tuple[int, int] | None = None,
) -> Plan:
    """The plan of a stage ("sft" or "grpo"). image_wh: as in `row_of`."""
    shape = model_shape(profile.models.small)
    row = row_of(profile, stage, shape, image_wh)
    setting = make_setting(profile, stage, on, shape=shape, row=row)
    return Plan(stage, setting, samples_of(profile, stage, task, shape))


def default_hardware(
    profile: Profile, name: str | None, count: int | None, memory_gib: float | None = None
) -> Hardware:
    """The profile's processes on A100 of 80 GB, or this CPU where it is made for one."""
    launch = profile.launch
    small = launch.accelerate_config is None and profile.grpo.rollout == "transformers"
    processes = 1 if launch.accelerate_config is None else launch.num_processes
    return hardware(name or ("cpu" if small else "a100"), count or processes, memory_gib)


def as_text(plan: Plan) -> str:
    """A plan to read: a line for each part, with its arithmetic."""
    setting, row = plan.setting, plan.setting.row
    phases = [phase for phase in ALL if plan.stage == "grpo" or phase != "rollout"]
    lines = [
        f"{plan.stage.upper()} of {setting.shape.parameters:,} parameters on {setting.hardware}; "
        f"{setting.trained:,} are trained",
        f"A row: {row.image:,} tokens of the image, {row.question} of the question, "
        f"{row.answer} to {row.longest:,} of the answer. "
        f"A pass: {setting.rows} rows, {setting.tokens:,} tokens at most.",
        "",
        f"{'Memory of one device, GiB':28}" + "".join(f"{phase:>10}" for phase in phases),
    ]
    for part in plan.parts:
        cells = "".join(_cell(part.bytes if phase in part.phases else None) for phase in phases)
        lines.append(f"  {part.name:26}{cells}   {part.how}")
    totals = "".join(_cell(total_bytes(plan.parts, phase)) for phase in phases)
    lines += [f"  {'together':26}{totals}   {_verdict(plan)}", ""]
    for amount in [*plan_work.disk(setting), plan_work.host(setting)]:
        if amount.value:
            lines.append(f"  {amount.name:26}{amount.value:10,.1f} {amount.unit:4} {amount.how}")
    steps = plan_work.steps_of(setting, plan.samples)
    lines += ["", f"Hours for {plan.samples:,} samples in {steps:,} steps"]
    for amount in plan_work.hours(setting, plan.samples):
        lines.append(f"  {amount.name:26}{amount.value:10,.1f}      {amount.how}".rstrip())
    return "\n".join(lines)


def _cell(size: float | None) -> str:
    return f"{'':>10}" if size is None else f"{size / GIB:10.2f}"


def _verdict(plan: Plan) -> str:
    memory_gib = plan.setting.hardware.device.memory_gib
    if not plan.vllm_fits:
        need, share = (size / GIB for size in vllm_need(plan.setting))
        return (
            f"does not fit: vLLM needs {need:.1f} GiB for weights and one context, and its share "
            f"is {share:.1f}: raise grpo.vllm_gpu_memory_utilization"
        )
    word = "fits" if plan.fits else "does not fit"
    return f"{word} into {memory_gib:.0f} GiB, of which {FREE_SHARE:.0%} stay free"


def _image_wh(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.training.plan", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--profile", required=True)
    parser.add_argument("--task", choices=TASKS, default="vanilla")
    parser.add_argument("--gpu", choices=tuple(DEVICES), help="default: a100, or cpu for mini")
    parser.add_argument("--gpus", type=int, help="default: the profile's launch.num_processes")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of one device")
    parser.add_argument(
        "--image",
        type=_image_wh,
        metavar="WxH",
        help="px of an image; default: 640x480, the commonest size of COCO",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)
    return ends(lambda: _print_plan(args))


def _print_plan(args: argparse.Namespace) -> None:
    profile = load_profile(args.profile)
    on = default_hardware(profile, args.gpu, args.gpus, args.memory)
    plans = [make_plan(profile, stage, on, task=args.task, image_wh=args.image) for stage in STAGES]
    if args.json:
        print(json.dumps([plan.as_dict() for plan in plans], indent=2))
    else:
        print("\n\n".join(map(as_text, plans)))


if __name__ == "__main__":
    sys.exit(main())
