"""Names of a run's models -> checkpoints and prompts, and the engine that a profile asks for.

An engine is imported where it is made: its libraries take seconds, and notebooks name models that
only their jobs ask.
"""

from collections.abc import Sequence
from dataclasses import replace

from egm_lib.errors import InputError
from egm_lib.inference.engine import Engine
from egm_lib.profile import (
    NO_REASONING,
    PROMPTED,
    Model,
    Profile,
    ProfileError,
    api_key,
    generation_of,
)
from egm_lib.prompts import FAMILIES
from egm_lib.run import Run


def model_of(run: Run, model: str, task: str) -> Model:
    """The checkpoint behind a name of a run: one that the profile names, or a model that the run
    trained for this task.
    """
    models = run.profile.models
    if (named := models.named(model)) is not None:
        return named
    path = run.checkpoint(task, model.partition("@")[0].removesuffix(NO_REASONING))
    if not path.is_dir():
        known = ", ".join([*models.bases, "reference"])
        raise FileNotFoundError(f"no checkpoint {path}; train it first, or use one of {known}")
    return replace(models.small, path=str(path), revision=None)


def prompt_of(profile: Profile, model: str, checkpoint: Model, tasks: Sequence[str]) -> str:
    """The name of the prompt that a model is asked with: the one in its own name, as in
    `small-base@prompt-authors-eval`, or the profile's.

    checkpoint: the model's. Raises InputError where its family lacks the prompt, or has it for
    other tasks only.
    """
    _, _, variant = model.partition("@")
    if not variant.startswith(PROMPTED):
        return profile.evaluation.prompt
    name, family = variant.removeprefix(PROMPTED), FAMILIES[checkpoint.family]
    for task in tasks:
        if task not in family.prompts.get(name, ()):
            known = [other for other, by_task in family.prompts.items() if task in by_task]
            raise InputError(
                f"{model}: {family.name} has no prompt {name!r} for the task {task}: use one of "
                f"{', '.join(known)}"
            )
    return name


def make_engine(
    profile: Profile, model: Model, seed: int = 0, *, for_latency: bool = False
) -> Engine:
    """The engine of a checkpoint: the one that the profile states for it, or for all.

    for_latency: nothing is remembered between requests, and an endpoint streams its answers.
    Raises FitError where the model does not fit the GPUs that it is given.
    """
    generation = generation_of(profile, model)
    if generation.engine == "openai":
        if generation.base_url is None:
            raise ProfileError(
                f"{profile.name}: {model.path} uses the engine openai, so it or "
                "`generation` needs a base_url"
            )
        from egm_lib.inference.openai_engine import OpenAIEngine

        return OpenAIEngine(
            generation.base_url,
            model.path,
            model.family,
            generation.batch_size,
            opens_reasoning=generation.opens_reasoning,
            token_limit=generation.token_limit,
            extra_body=generation.extra_body,
            max_pixels=model.max_pixels,
            revision=model.revision,
            seed=seed,
            stream=for_latency,
            key=api_key(generation.base_url, generation.api_key_env),
        )
    from egm_lib.inference.fit import check_fit

    check_fit(model, generation)
    common = {
        "dtype": model.dtype,
        "batch_size": generation.batch_size,
        "revision": model.revision,
        "max_pixels": model.max_pixels,
        "seed": seed,
    }
    if generation.engine == "vllm":
        from egm_lib.inference.vllm_engine import VLLMEngine

        return VLLMEngine(
            model.location,
            model.family,
            tensor_parallel=generation.tensor_parallel,
            gpu_memory_utilization=generation.gpu_memory_utilization,
            max_model_len=generation.max_model_len,
            for_latency=for_latency,
            **common,
        )
    from egm_lib.inference.transformers_engine import TransformersEngine

    return TransformersEngine(model.location, model.family, cache_vision=not for_latency, **common)
