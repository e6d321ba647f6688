"""Names of a run's models -> checkpoints, and the engine that a profile asks for."""

from egm_lib.inference.engine import Engine
from egm_lib.inference.openai_engine import OpenAIEngine
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.inference.vllm_engine import VLLMEngine
from egm_lib.profile import Model, Profile, ProfileError, api_key
from egm_lib.run import Run

# A model name with this ending is its model, reasoning switched off (Table 10)
NO_REASONING = "-no-reasoning"


def model_of(run: Run, model: str, task: str) -> Model:
    """The checkpoint behind a name of a run: a base of the profile, or a model that the run trained
    for this task.
    """
    models, plain = (
        run.profile.models,
        model.partition("@")[0],
    )  # after the @: `decoding`
    bases = {"small-base": models.small, "large-base": models.large, "reference": models.reference}
    if models.egm is not None:
        bases |= {"small-egm": models.egm, f"small-egm{NO_REASONING}": models.egm}
    if model in bases:
        return bases[model]
    path = run.checkpoint(task, plain.removesuffix(NO_REASONING))
    if not path.is_dir():
        raise FileNotFoundError(
            f"no checkpoint {path}; train it first, or use one of {', '.join(bases)}"
        )
    small = models.small
    return Model(
        path=str(path), family=small.family, dtype=small.dtype, max_pixels=small.max_pixels
    )


def make_engine(
    profile: Profile, model: Model, seed: int = 0, *, for_latency: bool = False
) -> Engine:
    """The profile's engine for a checkpoint.

    for_latency: nothing is remembered between requests, and an endpoint streams its answers.
    """
    generation = profile.generation
    if generation.engine == "openai":
        if generation.base_url is None:
            raise ProfileError(
                f"{profile.name}: generation.engine is openai, so generation.base_url is needed"
            )
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
    common = {
        "dtype": model.dtype,
        "batch_size": generation.batch_size,
        "revision": model.revision,
        "max_pixels": model.max_pixels,
        "seed": seed,
    }
    if generation.engine == "vllm":
        return VLLMEngine(
            model.location, model.family, tensor_parallel=generation.tensor_parallel, **common
        )
    return TransformersEngine(model.location, model.family, cache_vision=not for_latency, **common)
