"""The same RL run for VeRL, the paper's framework: its samples, its options, the reward.

`python -m egm_lib.training.verl_export --profile paper-qwen3vl-8b` writes train.parquet (in VeRL's
schema), overrides.txt (Table 6 as Hydra overrides) and run.sh into the run's folder `verl/`. VeRL
itself is not needed here. Where it is installed, tests/training/test_verl.py passes parquet and
overrides to VeRL's own RLHFDataset, configuration and checks (done with verl 0.9.1 on a CPU; no
training was run).
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from datasets import Dataset

import egm_lib.reward
from egm_lib.data import read_samples, resolve_image
from egm_lib.files import write_text
from egm_lib.profile import GRPO, Profile
from egm_lib.prompts import DEFAULT_PROMPT, FAMILIES, Family
from egm_lib.run import Run
from egm_lib.training.checkpoints import require_file
from egm_lib.training.command import stage_command
from egm_lib.training.model_setup import TrainingError, rollout_context

REWARD = Path(egm_lib.reward.__file__)
# Tokens, ours: 13 tiles of 256 (InternVL-3) and the question; VeRL's default is 512
MAX_PROMPT = 4_096


def verl_rows(
    samples: Iterable[Mapping],
    family: Family,
    root: Path,
    weight: float,
    max_pixels: int | None = None,
    prompt_name: str = DEFAULT_PROMPT,
) -> Iterator[dict]:
    """Samples as VeRL's RLHFDataset reads them; `<image>` in the prompt stands for the image."""
    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    for number, sample in enumerate(samples):
        prompt = family.prompt(sample["expression"], sample["task"], name=prompt_name)
        yield {
            "data_source": f"egm/{sample['dataset']}",
            "prompt": [{"role": "user", "content": f"<image>\n{prompt}"}],
            "images": [{"image": f"file://{resolve_image(sample, root).resolve()}", **limit}],
            "ability": f"grounding/{sample['task']}",
            "reward_model": {"style": "rule", "ground_truth": [float(v) for v in sample["gt_box"]]},
            "extra_info": {
                "index": number,
                "sample_id": sample["sample_id"],
                "width": sample["width"],
                "height": sample["height"],
                "ground_truth_frame": "pixel",
                "frame": family.frame.value,
                "weight": weight,
            },
        }


def verl_overrides(
    profile: Profile, seed: int, *, model: Path, train: Path, out: Path
) -> dict[str, object]:
    """Table 6 under VeRL's own names. Raises TrainingError for what VeRL cannot do."""
    grpo = profile.grpo
    if grpo.mask_truncated_completions:
        raise TrainingError(
            "VeRL trains on truncated completions: set grpo.mask_truncated_completions to false."
        )
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    rows = grpo.per_device_train_batch_size
    context = rollout_context(grpo)
    return {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,  # the KL is a term of the loss, Eq. 3
        "data.train_files": str(train),
        "data.val_files": str(train),
        "data.train_batch_size": grpo.prompts_per_step,
        "data.max_prompt_length": min(MAX_PROMPT, context - grpo.max_completion_length),
        "data.max_response_length": grpo.max_completion_length,
        "data.image_key": "images",
        "data.seed": seed,
        "actor_rollout_ref.model.path": str(model),
        f"{actor}.ppo_mini_batch_size": grpo.prompts_per_step,
        f"{actor}.ppo_micro_batch_size_per_gpu": rows,
        **_token_budget(grpo),
        f"{actor}.loss_agg_mode": "token-mean",
        f"{actor}.policy_loss.loss_mode": {"token": "vanilla", "sequence": "gspo"}[
            grpo.ratio_level
        ],
        f"{actor}.clip_ratio": grpo.epsilon,
        f"{actor}.use_kl_loss": grpo.beta > 0,
        f"{actor}.kl_loss_coef": grpo.beta,
        f"{actor}.kl_loss_type": "low_var_kl",
        f"{actor}.entropy_coeff": grpo.entropy_coef,
        f"{actor}.optim.lr": grpo.learning_rate,
        f"{actor}.optim.lr_warmup_steps": grpo.warmup_steps,
        f"{actor}.optim.lr_scheduler_type": grpo.lr_scheduler_type,
        f"{actor}.freeze_vision_tower": grpo.freeze_vision,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": rows,
        f"{rollout}.name": "vllm",
        f"{rollout}.n": grpo.num_generations,
        f"{rollout}.temperature": grpo.temperature,
        f"{rollout}.top_p": grpo.top_p,
        f"{rollout}.top_k": -1 if grpo.top_k is None else grpo.top_k,
        f"{rollout}.dtype": grpo.rollout_dtype,
        f"{rollout}.max_model_len": context,
        f"{rollout}.gpu_memory_utilization": grpo.vllm_gpu_memory_utilization,
        f"{rollout}.free_cache_engine": grpo.vllm_sleep,  # VeRL's name for vLLM's sleep
        f"{rollout}.log_prob_micro_batch_size_per_gpu": rows,
        "custom_reward_function.path": str(REWARD),
        "custom_reward_function.name": "compute_score",
        "trainer.total_epochs": _whole_epochs(grpo),
        "trainer.n_gpus_per_node": profile.launch.num_processes,
        "trainer.nnodes": 1,
        "trainer.logger": ["console", "tensorboard"],  # VeRL's default asks for an account at wandb
        # The validation files are the training's: notebook 07 evaluates
        "trainer.val_before_train": False,
        "trainer.default_local_dir": str(out / "checkpoints"),
        "trainer.project_name": "egm",
        "trainer.experiment_name": f"{profile.name}-{seed}",
    }


def _token_budget(grpo: GRPO) -> dict[str, object]:
    """Micro-batches by tokens instead of rows; reference and rollout follow the actor's."""
    if grpo.micro_batch_tokens is None:
        return {}
    actor = "actor_rollout_ref.actor"
    return {
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": grpo.micro_batch_tokens,
    }


def _whole_epochs(grpo: GRPO) -> int:
    if grpo.num_train_epochs != int(grpo.num_train_epochs):
        raise TrainingError(
            f"VeRL trains whole epochs: grpo.num_train_epochs is {grpo.num_train_epochs}; set it "
            "to a whole number"
        )
    return int(grpo.num_train_epochs)


def export(run: Run, task: str) -> Path:
    """Writes parquet, overrides and start script of a run's RL samples; returns their folder."""
    profile, out = run.profile, run.root / "verl" / task
    family = FAMILIES[profile.models.small.family]
    samples = read_samples(require_file(run.samples(f"rl_{task}"), "notebook 05"))
    out.mkdir(parents=True, exist_ok=True)
    train, temporary = out / "train.parquet", out / "train.parquet.tmp"
    rows = verl_rows(
        samples,
        family,
        profile.data.path,
        profile.grpo.reward_weight,
        profile.models.small.max_pixels,
        profile.grpo.prompt,
    )
    Dataset.from_list(list(rows)).to_parquet(str(temporary))
    os.replace(temporary, train)
    overrides = verl_overrides(
        profile, run.seed, model=run.checkpoint(task, "small-sft"), train=train, out=out
    )
    lines = [f"{name}={_hydra(value)}" for name, value in overrides.items()]
    write_text(out / "overrides.txt", "\n".join(lines) + "\n")
    command = " \\\n  ".join(["python -m verl.trainer.main_ppo", *map(shlex.quote, lines)])
    heading = "#!/bin/sh\n# Where verl and this project (`pip install -e .`) are installed.\n"
    write_text(out / "run.sh", f"{heading}{command}\n")
    return out


def _hydra(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def main(argv: list[str] | None = None) -> int:
    description = __doc__.split("\n")[0]
    return stage_command(
        "training.verl_export", description, argv, lambda run, args: export(run, args.task)
    )


if __name__ == "__main__":
    sys.exit(main())
