"""GRPO (Sec. 4.2) through TRL's GRPOTrainer, with the reward of Eq. 8 and the objective of Eq. 3-7.

`python -m egm_lib.grpo --profile mini --seed 0 --task vanilla` reads the run's RL samples and its
`small-sft`, and writes `small-egm`. Logged at each step, under TRL's names where it has one: reward
and its parts (acc_at_50, mean_iou), group_std and frac_reward_zero_std (groups that teach nothing),
completions/*, kl, entropy, clip_ratio/*, seconds of rollout, reward and update (time/*),
tokens_per_second (sampled). With `grpo.held_out_prompts` also rewards and completions of prompts
that are not trained on, as eval_reward and so on. Some of the last groups are kept to be read
(egm_lib.training.group_keeper).

Deviations from TRL, with rollouts by transformers on one process:
1. A group's prompt is read once, in sampling and in the update.
2. Groups whose rewards are all equal are not trained on, since their advantages are zero. Their KL
   and entropy terms are lost, and their tokens do not count in the token-level mean.
3. With mask_truncated_completions, a truncated completion is removed from the update's batch. TRL
   keeps it and masks it.

With vLLM, TRL's importance weighting of sampled tokens is disabled, since Eq. 3 has none. The
trainer's log-probs are compared with the sampler's in the first step of every run, a resumed one
too, and again after every `grpo.check_steps`. Training stops if they disagree. vLLM samples such a
step without top-p and top-k.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig

from egm_lib.data import open_image, read_samples, resolve_image
from egm_lib.inference.loading import image_token_ids, load_processor
from egm_lib.inference.shared_prefix import Reader
from egm_lib.inference.vision_cache import freeze_vision
from egm_lib.inference.vllm_engine import VLLM_LIMITS
from egm_lib.parsing import accepts, parse_completion
from egm_lib.profile import GRPO, Profile, generation_of
from egm_lib.prompts import DEFAULT_PROMPT, FAMILIES, Family
from egm_lib.reward import grounding_reward
from egm_lib.run import Run
from egm_lib.training.checkpoints import (
    is_finished,
    require_checkpoint,
    require_file,
    train_to,
    work_folder,
)
from egm_lib.training.clock import Clock
from egm_lib.training.command import stage_command
from egm_lib.training.group_keeper import GroupKeeper
from egm_lib.training.groups import SAMPLE_FIELDS
from egm_lib.training.grpo_shared_prefix import SharedPrefixGRPO
from egm_lib.training.grpo_trainer import answer_texts
from egm_lib.training.grpo_trl import PlainGRPO
from egm_lib.training.model_setup import (
    TrainingError,
    can_share_prefix,
    chat_text,
    common_options,
    freeze_tower,
    load_start,
    lora_config,
    rollout_context,
    share_keys,
    use_one_gpu,
)
from egm_lib.training.preflight import check_device, check_memory, check_rollout

MODEL = "small-egm"
# Where the vLLM server of `grpo.rollout: vllm-server` runs, if not on this machine
SERVER_VARIABLE = "EGM_VLLM_SERVER"


def grpo_options(options: GRPO, work: Path, seed: int, num_processes: int = 1) -> dict:
    """A profile's `grpo` section as TRL's GRPOConfig takes it."""
    rows = options.prompts_per_step * options.num_generations
    per_step = options.per_device_train_batch_size * num_processes
    if rows % per_step:
        raise TrainingError(
            f"prompts_per_step x num_generations = {rows} does not divide into batches of "
            f"{per_step} ({num_processes} processes): change grpo.per_device_train_batch_size."
        )
    return common_options(work, seed, options.compute_dtype or options.dtype) | {
        "num_train_epochs": options.num_train_epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.per_device_train_batch_size,
        "gradient_accumulation_steps": rows // per_step,
        "num_generations": options.num_generations,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.lr_scheduler_type,
        "warmup_steps": options.warmup_steps,
        "max_completion_length": options.max_completion_length,
        "mask_truncated_completions": options.mask_truncated_completions,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k or 0,
        "loss_type": "dapo",  # token-level mean, Eq. 3
        "beta": options.beta,
        # TRL's default multiplies the KL by the ratio; the paper's does not
        "use_bias_correction_kl": False,
        "epsilon": options.epsilon,
        "entropy_coef": options.entropy_coef,
        "scale_rewards": "group",  # Eq. 7
        "importance_sampling_level": options.ratio_level,
        "use_vllm": options.rollout != "transformers",
        "vllm_mode": "server" if options.rollout == "vllm-server" else "colocate",
        "vllm_server_host": os.environ.get(SERVER_VARIABLE, "localhost"),
        "vllm_gpu_memory_utilization": options.vllm_gpu_memory_utilization,
        "log_multimodal": False,  # TRL would send the images of all processes to each other
        "vllm_enable_sleep_mode": options.rollout == "vllm-colocate" and options.vllm_sleep,
        **(_held_out_options(options, num_processes) if options.held_out_prompts else {}),
    }


def _held_out_options(options: GRPO, num_processes: int) -> dict:
    """When, and in which batches, the held-out prompts are answered: each once.

    Raises TrainingError for batches of different sizes: TRL logs the mean of their means.
    """
    count = options.held_out_prompts
    batch = min(options.per_device_train_batch_size, max(1, count // num_processes))
    if count % (batch * num_processes):
        raise TrainingError(
            f"grpo.held_out_prompts = {count} does not divide into batches of "
            f"{batch * num_processes} ({num_processes} processes): take a multiple of it."
        )
    return {
        "eval_strategy": "steps",
        "eval_steps": options.held_out_steps,
        "eval_on_start": True,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": batch,
    }


def grpo_config(options: GRPO, work: Path, seed: int) -> GRPOConfig:
    """TRL's configuration of the stage, for as many processes as were launched.

    It comes before the model: DeepSpeed then divides the weights among the processes while they
    are loaded. Raises TrainingError if a step would not have the profile's size.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    config = GRPOConfig(**grpo_options(options, work, seed, processes))
    use_one_gpu(config)
    rows = options.prompts_per_step * options.num_generations
    if config.generation_batch_size != rows:
        raise TrainingError(
            f"a step would sample {config.generation_batch_size} completions instead of "
            f"prompts_per_step x num_generations = {rows}: WORLD_SIZE is {processes}, and TRL sees "
            f"{config.world_size} processes. Start the stage with `accelerate launch`."
        )
    return config


def hold_out(samples: Sequence[Mapping], count: int, seed: int) -> tuple[list, list]:
    """(samples to train on, `count` samples held out), divided by images at random.

    No image of a held-out sample is trained on. Raises TrainingError where nothing would be left.
    """
    images = sorted({sample["image_id"] for sample in samples})
    random.Random(seed).shuffle(images)
    sizes = Counter(sample["image_id"] for sample in samples)
    filled = accumulate((sizes[image] for image in images), initial=0)
    apart = {image for image, before in zip(images, filled, strict=False) if before < count}
    trained = [sample for sample in samples if sample["image_id"] not in apart]
    if not trained:
        raise TrainingError(
            f"grpo.held_out_prompts = {count} leaves none of {len(samples)} RL samples to train on:"
            " lower it, or set it to 0."
        )
    return trained, [sample for sample in samples if sample["image_id"] in apart][:count]


def question_rows(
    samples: Iterable[Mapping], family: Family, root: Path, prompt: str = DEFAULT_PROMPT
) -> Iterator[dict]:
    """TRL's prompt rows of samples: `image` is a file, and what the reward needs stands beside."""
    for sample in samples:
        yield {
            "prompt": [
                {
                    "role": "user",
                    "content": family.prompt(sample["expression"], sample["task"], name=prompt),
                }
            ],
            "image": str(resolve_image(sample, root)),
            "gt_box": list(sample["gt_box"]),
            "image_wh": [sample["width"], sample["height"]],
            "sample": {field: sample[field] for field in SAMPLE_FIELDS},
        }


def begun_answer(processor, family: Family) -> str:
    """What the chat template has begun of every answer: `<think>`, or nothing."""
    begun = chat_text(processor, [{"role": "user", "content": "?"}]).endswith(
        family.reasoning_opener
    )
    return family.reasoning_opener if begun else ""


def make_reward(processor, family: Family, weight: float) -> Callable[..., list[float]]:
    """TRL's reward function; puts back what the chat template has begun before parsing.

    Logs the mean IoU and the share of completions with IoU > 0.5 (Eq. 1), whatever the weight is.
    """
    opener = begun_answer(processor, family)

    def reward(completions, gt_box, image_wh, *, log_metric=None, **kwargs) -> list[float]:
        texts = [opener + text for text in answer_texts(completions)]
        boxes = [
            parse_completion(text, frame=family.frame, image_wh=tuple(wh)).box
            for text, wh in zip(texts, image_wh, strict=True)
        ]
        pairs = list(zip(boxes, gt_box, strict=True))
        if log_metric is not None:
            overlaps = [grounding_reward(box, gt, weight=0.0) for box, gt in pairs]  # Eq. 8's IoU
            log_metric("acc_at_50", sum(map(accepts, overlaps)) / len(overlaps))
            log_metric("mean_iou", sum(overlaps) / len(overlaps))
        return [grounding_reward(box, gt, weight) for box, gt in pairs]

    return reward


def make_grpo_trainer(
    model,
    processor,
    rows: Iterable[Mapping],
    family: Family,
    options: GRPO,
    *,
    work: Path,
    log: Path,
    groups: Path,
    seed: int,
    shared_prefix: bool | None = None,
    reward: Callable | None = None,
    config: GRPOConfig | None = None,
    held_out: Iterable[Mapping] = (),
):
    """The trainer of the stage.

    rows, held_out: from `question_rows`. groups: file of the groups that are kept
    (egm_lib.training.group_keeper). shared_prefix: whether to use the trainer that also samples
    with a shared prefix; None: if the profile allows it and it is possible. reward: instead of
    Eq. 8. config: from `grpo_config`, if it was needed before the model.
    """
    # TRL pads prompt ids on the left, and `mm_token_type_ids` on the tokenizer's side. M-RoPE
    # counts positions from both (TRL #5785)
    processor.tokenizer.padding_side = "left"
    dataset = Dataset.from_list(list(rows))
    if not len(dataset):
        raise TrainingError("there are no RL samples: the selection (notebook 05) kept none.")
    config = config or grpo_config(options, work, seed)
    # Without it vLLM sets memory aside for all that the model could read, 262,144 tokens of
    # Qwen3-VL-Thinking
    config.vllm_max_model_length = min(
        rollout_context(options), model.config.get_text_config().max_position_embeddings
    )
    if config.use_vllm:  # with transformers, TRL does this itself
        config.generation_kwargs = {
            "logit_bias": dict.fromkeys(image_token_ids(model.config), -100.0)
        }
    # TRL drops rows that do not fill a step, and would train on nothing
    if len(dataset) < options.prompts_per_step:
        repeats = -(-options.prompts_per_step // len(dataset))
        print(
            f"{len(dataset)} RL samples for steps of {options.prompts_per_step}: each stands "
            f"{repeats} times in one"
        )
        dataset = Dataset.from_list(list(dataset) * repeats)
    arguments = {
        "model": model,
        "args": config,
        "processing_class": processor,
        "clock": Clock(log, options.max_minutes, 60 * options.save_minutes),
        "keeper": GroupKeeper(groups, begun_answer(processor, family)),
        "peft_config": lora_config(options.lora),
        "rollout_dtype": options.rollout_dtype,
        "check_steps": options.check_steps,
        "reward_funcs": reward or make_reward(processor, family, options.reward_weight),
        "eval_dataset": Dataset.from_list(list(held_out)) if options.held_out_prompts else None,
    }
    auto = options.shared_prefix == "auto"
    if shared_prefix is None:
        shared_prefix = auto and can_share_prefix(family, options, config)
    if shared_prefix:
        share_keys(config)
        reader = Reader(processor, model, freeze_vision(model), open_image)
        return SharedPrefixGRPO(train_dataset=dataset, reader=reader, **arguments)
    freeze_tower(model, family, tower=options.freeze_vision, merger=options.freeze_merger)
    return PlainGRPO(
        train_dataset=dataset,
        micro_batch_tokens=options.micro_batch_tokens,
        pack_groups=auto,
        **arguments,
    )


def run_grpo(run: Run, task: str, *, output: str | None = None, prompts: str | None = None) -> Path:
    """Trains a run's EGM model from its SFT model; returns its folder.

    A finished model is left as it is.
    output: another name for the model, whose log and groups then bear that name.
    prompts: the file of RL samples, a name for `run.samples`; default: those of notebook 05.
    """
    profile, out = run.profile, run.checkpoint(task, output or MODEL)
    if is_finished(out):
        return out
    family, options = FAMILIES[profile.models.small.family], profile.grpo
    check_rollout(options)
    check_device(options.dtype, "grpo")
    check_device(options.compute_dtype or options.dtype, "grpo", "compute_dtype")
    start = str(
        require_checkpoint(run, task, "small-sft", f"`python -m egm_lib.sft --task {task}`")
    )
    check_memory(profile, "grpo", start)
    selected = read_samples(require_file(run.samples(prompts or f"rl_{task}"), "notebook 05"))
    samples, held_out = hold_out(selected, options.held_out_prompts, run.seed)
    work = work_folder(out)
    config = grpo_config(options, work, run.seed)
    # A folder's name, not a model in memory: TRL loads the KL's reference from it.
    model, processor = load_start(
        start, profile.models.small, options.dtype if options.lora else "float32"
    )
    prompt = (family, profile.data.path, options.prompt)
    try:
        trainer = make_grpo_trainer(
            model,
            processor,
            question_rows(samples, *prompt),
            family,
            options,
            work=work,
            log=run.log(f"{'-'.join(filter(None, ('grpo', output, task)))}.jsonl"),
            groups=run.groups("-".join(filter(None, (output, task)))),
            seed=run.seed,
            config=config,
            held_out=question_rows(held_out, *prompt),
        )
    except OSError as error:  # such as a server that does not answer, after TRL has waited for it
        if options.rollout != "vllm-server":
            raise
        gpus = generation_of(run.profile, run.profile.models.small).tensor_parallel
        raise TrainingError(
            f"{error} Start one on separate GPUs: `{server_command(start, options, gpus)}`"
        ) from error
    # The start's processor as it was: limits of a profile are not stored in a checkpoint.
    return train_to(trainer, load_processor(start, profile.models.small.family), out)


def server_command(model: str, options: GRPO, tensor_parallel: int) -> str:
    """The command that starts a vLLM server for `grpo.rollout: vllm-server`.

    TRL samples from it and sends it new weights. tensor_parallel: GPUs that the model is cut over.
    """
    limits = json.dumps(VLLM_LIMITS)
    return (
        f"trl vllm-serve --model {model} --dtype {options.rollout_dtype} "
        f"--max-model-len {rollout_context(options)} --tensor-parallel-size {tensor_parallel} "
        f"--limit-mm-per-prompt '{limits}'"
    )


def grpo_dry_run(
    profile: Profile, seed: int, task: str, output: str | None = None, prompts: str | None = None
) -> dict:
    """What would be trained, under TRL's own option names; loads no model."""
    run = Run(profile, seed)
    out = run.checkpoint(task, output or MODEL)
    stage = {
        "stage": "grpo",
        "task": task,
        "model": str(run.checkpoint(task, "small-sft")),
        "output": str(out),
        "samples": str(run.samples(prompts or f"rl_{task}")),
        "max_minutes": profile.grpo.max_minutes,
        "prompts_per_step": profile.grpo.prompts_per_step,
        "reward_weight": profile.grpo.reward_weight,
    }
    work, processes = work_folder(out), profile.launch.num_processes
    return stage | grpo_options(profile.grpo, work, seed, processes)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", help=f"name of the model; default: {MODEL}")
    parser.add_argument(
        "--prompts", help="name of a file in the run's folder samples/; default: rl_TASK"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved options as JSON")


def _train(run: Run, args: argparse.Namespace) -> object:
    if args.dry_run:
        resolved = grpo_dry_run(run.profile, run.seed, args.task, args.output, args.prompts)
        return json.dumps(resolved, indent=2)
    return run_grpo(run, args.task, output=args.output, prompts=args.prompts)


def main(argv: list[str] | None = None) -> int:
    return stage_command("grpo", __doc__.split("\n")[0], argv, _train, add_options=_options)


if __name__ == "__main__":
    sys.exit(main())
