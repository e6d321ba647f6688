"""A paper profile's rehearsal: the same profile with stand-ins, few samples and steps.

`build_standins` makes what stands in; `rehearsal_profile` writes the profile that names it. What
they leave alone is what is rehearsed: every other value of the profile, and all the code.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import torch
import yaml

from egm_lib.pipeline.rehearsal.annotations import write_downloads
from egm_lib.pipeline.rehearsal.checkpoints import make_internvl3, make_qwen3vl
from egm_lib.pipeline.rehearsal.services import service_url
from egm_lib.profile import Model, Profile, load_profile

STEPS, LIGHT_STEPS = 3, 2  # of SFT and of GRPO; the first of GRPO has a learning rate of 0
SAMPLES = {  # per split
    "train_limit": 16,
    "train_amodal_limit": 12,
    "selection_limit": 12,
    "selection_amodal_limit": 8,
    "eval_limit": 1,
}


def rehearsal_profile(name: str, folder: str | Path, *, full: bool, services_url: str) -> Path:
    """Writes `<folder>/profiles/<rehearsal_name>.yaml`, which extends the profile `name`.

    full: two processes (or one, on a machine with one GPU), launched as the profile says, with its
    engine, a checkpoint after each step of SFT, and trainer and sampler compared at each update of
    GRPO, which has a high rate; else one process a training, in float32, transformers as engine,
    and vanilla and amodal side by side. services_url: where `services.running` listens. Returns the
    file's path. Raises ProfileError for an unknown name.
    """
    folder, profile = Path(folder).resolve(), load_profile(name)
    changes = {
        "extends": name,
        "title": f"rehearsal of {profile.title}",
        "models": {
            # A stand-in fits one GPU, and has too few heads for several
            role: {
                "path": str(_place(folder, model)),
                "revision": None,
                "tensor_parallel": None,
                "engine": _engine(profile, full),
            }
            for role, model in profile.models.by_role().items()
        },
        "data": {"root": str(folder / "data"), **SAMPLES},
        "curation": _curation(profile, services_url),
        "evaluation": {"bootstrap_samples": 100},
        **_budgets(profile, full),
    }
    if profile.generation.engine == "openai":
        changes["generation"]["base_url"] = service_url("vllm", services_url)
    path = _profile_file(name, folder, full)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(changes, sort_keys=False), encoding="utf-8")
    return path


def rehearsal_name(name: str, *, full: bool) -> str:
    """What the rehearsal of a profile is called; each level has a run of its own."""
    return f"rehearse-full-{name}" if full else f"rehearse-{name}"


def rehearsed_port(name: str, folder: str | Path, *, full: bool) -> int | None:
    """The port of the local server in the profile of an earlier rehearsal; None without one.

    A rehearsal that continues asks there again.
    """
    path = _profile_file(name, Path(folder).resolve(), full)
    if not path.is_file():
        return None
    teacher = yaml.safe_load(path.read_text(encoding="utf-8"))["curation"]["teacher"]
    return urlsplit(teacher["base_url"]).port


def build_standins(name: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Makes the checkpoints that the profile `name` names, and the files that `prepare` reads.

    A checkpoint is called as the real one: rehearsals of several profiles can share a folder.
    Returns folder.
    """
    folder = Path(folder).resolve()
    for model in load_profile(name).models.by_role().values():
        place = _place(folder, model)
        own_seed = seed + zlib.crc32(place.name.encode())
        if model.family == "internvl-3":
            make_internvl3(place, seed=own_seed)
        else:
            make_qwen3vl(place, thinking="Instruct" not in place.name, seed=own_seed)
    write_downloads(folder / "data", seed=seed)
    return folder


def _profile_file(name: str, folder: Path, full: bool) -> Path:
    return folder / "profiles" / f"{rehearsal_name(name, full=full)}.yaml"


def _engine(profile: Profile, full: bool) -> str | None:
    """The engine of each model, where it is not the profile's: a laptop has no vLLM.

    The profile's own stays stated, so that notebooks show what they show with it.
    """
    return "transformers" if profile.generation.engine == "vllm" and not full else None


def _place(folder: Path, model: Model) -> Path:
    return folder / "models" / Path(model.path).name


def _curation(profile: Profile, services_url: str) -> dict:
    """Teacher and judges at the local server, with the names, limits and prices of the profile."""

    def moved(teacher) -> dict:
        service = "gemini" if "googleapis" in teacher.base_url else "openai"
        return dataclasses.asdict(teacher) | {"base_url": service_url(service, services_url)}

    curation = profile.curation
    return {
        "teacher": moved(curation.teacher),
        "judges": [moved(judge) for judge in curation.judges],
    }


def _budgets(profile: Profile, full: bool) -> dict:
    """Some steps of each training, with few rows, and short answers."""
    gpus = torch.cuda.device_count() or 2  # without GPUs, a CPU stands for two
    processes = min(2, profile.launch.num_processes, gpus) if full else 1
    steps = STEPS if full else LIGHT_STEPS
    sft = {"max_steps": steps}
    grpo = {
        "max_steps": steps,
        "prompts_per_step": 2 * processes,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "warmup_steps": 1,
        "max_completion_length": 48,
    }
    generation: dict = {"batch_size": 8, "sampling": {"max_new_tokens": 48}}
    if full:
        sft |= {"save_minutes": 0.0}
        # A rate at which a sampler with the weights of the update before would show
        grpo |= {"check_steps": 1, "learning_rate": 2e-3}
        if not torch.cuda.is_available():
            grpo |= {"vllm_sleep": False}  # vLLM gives no memory of a CPU back
    else:  # a laptop has neither half precision to train in nor vLLM
        sft |= {"dtype": "float32"}
        sft |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        grpo |= {"dtype": "float32", "compute_dtype": None}
        grpo |= {"rollout": "transformers", "rollout_dtype": "float32"}
    selection = {"fill_to": 4 * processes}  # the stand-ins solve little
    launch: dict = {"num_processes": processes}
    if not full:
        launch |= {"accelerate_config": None, "side_by_side": True}
    return {
        "sft": sft,
        "selection": selection,
        "grpo": grpo,
        "generation": generation,
        "launch": launch,
    }
