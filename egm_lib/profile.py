"""A profile is a file a person can read: everything that differs between a laptop and a GPU node.

`load_profile(name)` reads `egm_lib/profiles/<name>.yaml`. With `extends: other` it starts from the
values of another profile. Its `variants` are profiles too, called `<name>-<variant>`, such as
`paper-qwen3vl-8b-released`. A profile does not inherit the variants of the one that it extends; it
may take some of them over by name (`variants: [released]`).
`python -m egm_lib.profile NAME` prints a profile as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import sys
import types
import typing
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from egm_lib.errors import EgmError
from egm_lib.files import project_root
from egm_lib.prompts import DEFAULT_PROMPT, FAMILIES, FamilyName, PromptName, Task

DType = Literal["float32", "bfloat16", "float16"]
EngineName = Literal["transformers", "vllm", "openai"]

PROFILES_DIR = Path(__file__).parent / "profiles"
PROFILES_VARIABLE = "EGM_PROFILES"  # folders of profiles of your own, beside the shipped ones


class ProfileError(EgmError, ValueError):
    """A profile that does not exist or cannot be understood. The message says where, and what to
    change.
    """


MINI = "mini"  # base_url of the miniature world's teacher, in process


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the samples are. Limits count samples per split; null means all."""

    source: Literal["mini", "refcoco"]
    root: str  # relative to the project
    train_limit: int | None = None
    train_amodal_limit: int | None = None
    selection_limit: int | None = None
    selection_amodal_limit: int | None = None
    eval_limit: int | None = None
    # Source "mini": which scenes the test splits have; a new number has been seen by no model
    test_scenes: int = 0

    @property
    def path(self) -> Path:
        return project_root() / self.root


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint: a folder of the project or an id on the model hub, and its prompt format."""

    path: str
    family: FamilyName
    dtype: DType
    revision: str | None = None  # of a hub id
    # Larger images are shrunk to at most so many as they are read; smaller ones stay as they are.
    max_pixels: int | None = None
    # How this model is run, where that differs from `generation` (`generation_of`). One with a
    # base_url is asked there, by whatever engine the others answer.
    engine: EngineName | None = None
    tensor_parallel: int | None = None
    base_url: str | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None

    @property
    def location(self) -> str:
        """What `from_pretrained` needs: an absolute folder for a path in the project, else the hub
        id.
        """
        local = project_root() / self.path
        return str(local) if local.exists() or self.path.startswith(("data/", "/")) else self.path


# A model name with this ending is its model, reasoning switched off (Table 10)
NO_REASONING = "-no-reasoning"
# A model name with @, this and a prompt's name is its model, asked with that prompt
PROMPTED = "prompt-"


@dataclass(frozen=True, kw_only=True)
class Models:
    small: Model
    large: Model
    reference: Model  # "stronger model" of the learnability selection, Sec. 4.2
    huge: Model | None = None  # a third size that answers without reasoning, for Fig. 5
    egm: Model | None = None  # a published EGM model; null: `small-egm` is what the run trains

    @property
    def bases(self) -> tuple[str, ...]:
        """Names of the models that answer without reasoning, the smallest first."""
        return ("small-base", "large-base", *(["huge-base"] if self.huge else []))

    def by_role(self) -> dict[str, Model]:
        """The checkpoints that the profile states."""
        return {role: model for role, model in vars(self).items() if model is not None}

    def named(self, name: str) -> Model | None:
        """The checkpoint that a model's name in a run means; None: the run trains it.

        What follows an @ does not matter: another way to decode (egm_lib.inference.decoding), or
        another prompt.
        """
        roles = {"reference": "reference", "small-egm": "egm"} | {
            base: base.removesuffix("-base") for base in self.bases
        }
        role = roles.get(name.partition("@")[0].removesuffix(NO_REASONING))
        return self.by_role().get(role)


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars per million tokens."""

    prompt: float
    completion: float


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A vision-language service; base_url "mini" is the miniature world's teacher, in process."""

    base_url: str
    model: str
    temperature: float | None  # null: left out of the requests
    max_tokens: int
    concurrency: int
    price_per_mtok: Price | None = None
    # The environment variable that holds this service's key, never the key itself
    api_key_env: str = "OPENAI_API_KEY"
    # What the service calls its limit on tokens. null: max_completion_tokens for OpenAI's reasoning
    # models, else max_tokens; a service that refuses one of the two is asked with the other.
    token_limit: Literal["max_tokens", "max_completion_tokens"] | None = None
    # More fields of every request, such as {top_p: 0.9}. null leaves out one that is sent
    # otherwise. One that the service refuses is left out, too.
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Curation:
    teacher: Teacher
    judges: tuple[Teacher, ...]
    limit: int | None = None
    budget_usd: float | None = None  # of all tasks of a run together; paid services need one
    skip_filters: tuple[str, ...] = ()  # names of egm_lib.curation.filters that do not apply

    def judge_files(self) -> dict[str, Teacher]:
        """The judges by the name that each has in files. Raises ProfileError where two share one.

        A judge is known by its model, in the ledger too: the second would get the first's answers.
        """
        judges: dict[str, Teacher] = {}
        for judge in self.judges:
            name = judge.model.replace("/", "_")
            if name in judges:
                raise ProfileError(
                    f"curation.judges: {judges[name].model!r} and {judge.model!r} would share "
                    "their answers. Leave one out, or serve it under another name (vLLM: "
                    "--served-model-name)."
                )
            judges[name] = judge
        return judges


@dataclass(frozen=True, kw_only=True)
class Lora:
    r: int
    alpha: int
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SFT:
    num_train_epochs: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler_type: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    freeze_vision: bool
    # With both frozen, what an image looks like is computed once (egm_lib.inference.vision_cache)
    freeze_merger: bool = False
    dtype: DType
    answer_grid: int = 1  # answers are rounded to its multiples; 1: every value of 0..1000
    answer_label: bool = True  # whether an answer repeats the expression as its label
    prompt: PromptName = DEFAULT_PROMPT  # Fig. 7; the authors' SFT data have the same
    max_length: int | None = None
    max_pixels: int | None = None  # larger images are shrunk in SFT alone; null: as the checkpoint
    # Processes that decode images beside the training, where each image is read with its row
    dataloader_num_workers: int = 4
    max_steps: int | None = None  # stops earlier than the epochs
    max_minutes: float | None = None  # stops earlier than both
    # Ours: a checkpoint of an 8B with its optimizer is 123 GB, minutes of writing
    save_minutes: float = 30.0
    lora: Lora | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Learnability selection, Sec. 4.2: what the reference solves and the learner misses, and easy
    samples.
    """

    num_easy: Literal["equal", "none"]
    # What the reference answers: Sec. 4.2 needs the learner's misses; all: for the whole of Table 7
    reference: Literal["misses", "all"] = "misses"
    easy: Literal["uniform", "iou-buckets"]
    # Fewer are filled up with others of the pool: a smoke test's models are too weak to select by
    fill_to: int = 0


@dataclass(frozen=True, kw_only=True)
class GRPO:
    num_train_epochs: float
    prompts_per_step: int
    num_generations: int
    per_device_train_batch_size: int
    # Tokens of a forward and backward pass, padding included: those rows are divided further where
    # they have more. null: they are not
    micro_batch_tokens: int | None = None
    # Ours: "auto" reads the image and prompt of a group once where that is possible; "off" reads
    # them once for each completion, as TRL does
    shared_prefix: Literal["auto", "off"] = "auto"
    beta: float
    epsilon: float
    entropy_coef: float
    reward_weight: float
    ratio_level: Literal["token", "sequence"]
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    max_completion_length: int
    # True: one cut off at that length is not trained on, only counted
    mask_truncated_completions: bool = False
    temperature: float
    top_p: float
    top_k: int | None  # null: no limit
    rollout: Literal["transformers", "vllm-colocate", "vllm-server"]
    # Ours: steps between comparisons of trainer and sampler; 2 % of the steps cost a forward more
    check_steps: int = 50
    # Ours: so many RL samples, and all others of their images, are not trained on. They are
    # answered at the start, after every held_out_steps and at the end (eval_reward). 0: none
    held_out_prompts: int = 0
    held_out_steps: int = 10
    # Share of each GPU that a colocated vLLM takes: TRL's default
    vllm_gpu_memory_utilization: float = 0.3
    # True: a colocated vLLM gives its memory to the update, and takes new weights after each
    vllm_sleep: bool = False
    # Tokens of prompt and completion that vLLM sets memory aside for; null: its engine's limit here
    max_model_len: int | None = None
    freeze_vision: bool
    # With both frozen, what an image looks like is computed once (egm_lib.inference.vision_cache)
    freeze_merger: bool = False
    dtype: DType  # of the weights that the optimizer holds
    # Of forward and backward, under autocast; null: dtype. It must agree with the accelerate
    # configuration's mixed_precision
    compute_dtype: DType | None = None
    rollout_dtype: DType
    max_steps: int | None = None
    max_minutes: float | None = None
    # Fig. 7; the authors' RL data: "authors-eval"
    prompt: PromptName = DEFAULT_PROMPT
    # Ours: a checkpoint of an 8B with its optimizer is 123 GB, minutes of writing
    save_minutes: float = 30.0
    lora: Lora | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Table 8."""

    temperature: float
    top_p: float
    top_k: int | None
    max_new_tokens: int
    repetition_penalty: float


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How models are asked. A model of the profile may have an engine, tensor_parallel, base_url,
    gpu_memory_utilization and max_model_len of its own.
    """

    engine: EngineName
    batch_size: int
    sampling: Sampling
    tensor_parallel: int = 1  # engine "vllm": GPUs that one copy of the model is cut over
    gpu_memory_utilization: float = 0.9  # engine "vllm": share of each GPU; vLLM's default is 0.92
    # Engine "vllm": tokens of prompt and answer that it sets memory aside for; null: the engine's
    max_model_len: int | None = None
    base_url: str | None = None  # engine "openai"
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds that service's key
    # Engine "openai": the served model's chat template opens the reasoning, and the server has no
    # reasoning parser (Qwen3-VL Thinking without `--reasoning-parser`). Without this key a box that
    # the model merely considered would count.
    opens_reasoning: bool = False
    # Engine "openai": as of a Teacher. null: max_tokens; a service that refuses it is asked with
    # the other.
    token_limit: Literal["max_tokens", "max_completion_tokens"] | None = None
    # Engine "openai": as of a Teacher, such as {top_k: null, repetition_penalty: null}
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    rule: str  # a named rule of egm_lib.parsing
    bootstrap_samples: int
    # Fig. 7; the authors' evaluation: "authors-eval". Asked of models of every family
    prompt: PromptName = DEFAULT_PROMPT


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How long work starts: plain Python, or `accelerate launch`, on one machine or several.

    accelerate_config: a file of egm_lib/pipeline/configs, by name.
    """

    accelerate_config: str | None = None
    num_processes: int = 1  # of a training, one a GPU, on all nodes together
    nodes: int = 1  # machines of a training; a vLLM server for its rollouts is one more
    main_process_port: int = 29500  # where the nodes of a training meet; accelerate's default
    side_by_side: bool = False  # vanilla and amodal at the same time, one thread each
    # Processes that share the samples where there is no GPU. With GPUs there are as many as copies
    # of the model fit (`tensor_parallel`).
    prediction_workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Profile:
    name: str
    title: str
    seeds: tuple[int, ...]
    tasks: tuple[Task, ...]
    models: Models
    data: Data
    curation: Curation
    sft: SFT
    selection: Selection
    grpo: GRPO
    # Trainings that the paper lacks: is a gain only more training?
    controls: tuple[Literal["direct", "sft"], ...]
    generation: Generation
    evaluation: Evaluation
    launch: Launch

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """A short hash of every value but the budget, which changes no result: two profiles with
        the same digest ask for the same run.
        """
        values = self.as_dict()
        del values["curation"]["budget_usd"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def api_key(base_url: str, variable: str) -> str:
    """The key of a service, from the environment only; local and in-process services need none."""
    if not variable.isidentifier():  # not shown: it may be a key, put in the wrong place
        raise ProfileError(
            "api_key_env must be the name of an environment variable; the given value is not one"
        )
    key = os.environ.get(variable, "")
    if not key and not is_local(base_url):
        raise ProfileError(f"no key for {base_url}: set the environment variable {variable}")
    return key or "none"


def is_local(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    return base_url == MINI or host == "localhost" or host.startswith("127.") or host == "::1"


def _folders() -> list[Path]:
    others = os.environ.get(PROFILES_VARIABLE, "").split(os.pathsep)
    return [PROFILES_DIR, *map(Path, filter(None, others))]


def _file(name: str) -> Path | None:
    """The file of a profile, a shipped one before one of the user's; None if there is none."""
    paths = [folder / f"{name}.yaml" for folder in _folders()]
    return next((path for path in paths if path.is_file()), None)


def _file_names() -> list[str]:
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def profile_names() -> list[str]:
    """The names of all profiles: the files, then their variants.

    A file that cannot be read is named too: `load_profile` says what is wrong with it.
    """
    files = _file_names()
    names = list(files)
    for name in files:
        with contextlib.suppress(ProfileError):
            names += [f"{name}-{variant}" for variant in _raw(name)[1]]
    return names


@cache
def load_profile(name: str) -> Profile:
    """Reads a profile by name.

    Raises ProfileError for an unknown name, key or value; it names the nearest valid one.
    """
    values, _ = _raw(name)
    profile = _build(Profile, values | {"name": name}, name)
    for key in ("seeds", "tasks"):
        if not getattr(profile, key):
            raise ProfileError(f"{name}.{key}: expected at least one, got an empty list.")
    _check_prompts(profile)
    _check_machines(profile)
    profile.curation.judge_files()
    return profile


def generation_of(profile: Profile, model: Model) -> Generation:
    """How a model is asked: the profile's `generation`, with what the model states itself."""
    stated = {name: getattr(model, name) for name in _OF_A_MODEL}
    stated = {name: value for name, value in stated.items() if value is not None}
    if model.base_url is not None:
        stated.setdefault("engine", "openai")
    return replace(profile.generation, **stated)


_OF_A_MODEL = (
    "engine",
    "tensor_parallel",
    "base_url",
    "gpu_memory_utilization",
    "max_model_len",
)


def _check_machines(profile: Profile) -> None:
    """Raises ProfileError for numbers of GPUs, processes and nodes that cannot be."""
    launch, name = profile.launch, profile.name
    for key in ("num_processes", "nodes", "prediction_workers"):
        if getattr(launch, key) < 1:
            raise ProfileError(f"{name}.launch.{key}: expected at least 1.")
    if launch.num_processes % launch.nodes:
        raise ProfileError(
            f"{name}.launch: {launch.num_processes} processes do not divide among {launch.nodes} "
            "nodes; num_processes counts those of all nodes."
        )
    if launch.nodes > 1 and launch.accelerate_config is None:
        raise ProfileError(f"{name}.launch: several nodes need an accelerate_config.")
    for role, model in profile.models.by_role().items():
        generation = generation_of(profile, model)
        if generation.tensor_parallel < 1:
            raise ProfileError(f"{name}.models.{role}: tensor_parallel must be at least 1.")
        if not 0 < generation.gpu_memory_utilization <= 1:
            raise ProfileError(
                f"{name}.models.{role}: gpu_memory_utilization must be a share of a GPU, above "
                f"0 and at most 1, got {generation.gpu_memory_utilization}."
            )


def _check_prompts(profile: Profile) -> None:
    """Every model that a stage asks must have the stage's prompt, for every task of the profile."""
    models = profile.models
    asked = {
        "sft": [models.small],
        "grpo": [models.small, models.reference],
        "evaluation": [model for role, model in models.by_role().items() if role != "reference"],
    }
    for stage, asked_models in asked.items():
        prompt = getattr(profile, stage).prompt
        for family in (FAMILIES[model.family] for model in asked_models):
            missing = [task for task in profile.tasks if task not in family.prompts.get(prompt, ())]
            if missing:
                raise ProfileError(
                    f"{profile.name}.{stage}.prompt: {family.name} has no prompt {prompt!r} for "
                    f"the task {missing[0]!r}. It has {', '.join(family.prompts)}."
                )


def _raw(name: str, extended_by: tuple[str, ...] = ()) -> tuple[dict, dict[str, dict]]:
    """A profile's values with what it extends merged in, and its variants.

    extended_by: the profiles on the way to this one, to find one that extends itself.
    """
    path = _file(name)
    if path is None:
        return _raw_variant(name, extended_by), {}
    if name in extended_by:
        way = " -> ".join((*extended_by, name))
        raise ProfileError(f"{path} extends itself: {way}. Change one `extends`.")
    values = _read_yaml(path)
    base, base_variants = {}, {}
    if "extends" in values:
        extended = values.pop("extends")
        if not isinstance(extended, str):
            raise ProfileError(f"{name}.extends: expected a profile's name, got {extended!r}.")
        base, base_variants = _raw(extended, (*extended_by, name))
    variants = _variants(values.pop("variants", {}), base_variants, name)
    return _merge(base, values), variants


def _raw_variant(name: str, extended_by: tuple[str, ...]) -> dict:
    """The values of `<profile>-<variant>`."""
    parts = name.split("-")
    for end in range(len(parts) - 1, 0, -1):  # both parts may have hyphens
        base, variant = "-".join(parts[:end]), "-".join(parts[end:])
        if _file(base) is not None:
            values, variants = _raw(base, extended_by)
            if variant in variants:
                return _merge(values, variants[variant])
    known = _file_names()
    extending = f" ({extended_by[-1]} extends it)" if extended_by else ""
    raise ProfileError(
        f"There is no profile {name!r}{extending}.{_nearest(name, known)} Known: "
        f"{', '.join(known)}."
    )


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"{type(values).__name__}"
        raise ProfileError(f"{path} is not a profile: expected keys and values, found {found}.")
    return values


def _variants(stated: Any, of_base: dict[str, dict], name: str) -> dict[str, dict]:
    """The variants of a profile by name; a list takes over those of the profile that it extends."""
    if isinstance(stated, list):
        for variant in stated:
            if not isinstance(variant, str) or variant not in of_base:
                known = ", ".join(of_base) or "none"
                raise ProfileError(
                    f"{name}.variants: the profile that it extends has no variant {variant!r}. "
                    f"Known: {known}."
                )
        return {variant: of_base[variant] for variant in stated}
    if not isinstance(stated, dict) or not all(
        isinstance(changes, dict) for changes in stated.values()
    ):
        raise ProfileError(f"{name}.variants: expected a section for each variant, got {stated!r}.")
    return stated


def _merge(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` (from YAML) as the annotated type `kind`.

    where: the place that a ProfileError names, such as `mini.grpo.beta`.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ProfileError(f"{where}: expected a section, got {value!r}.")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                hint = _nearest(str(key), list(hints)) or f" Known: {', '.join(hints)}."
                raise ProfileError(f"{where}: unknown key {key!r}.{hint}")
        for known in dataclasses.fields(kind):
            required = known.default is known.default_factory is dataclasses.MISSING
            if required and known.name not in value:
                raise ProfileError(f"{where}: {known.name!r} is missing.")
        return kind(
            **{key: _build(hints[key], item, f"{where}.{key}") for key, item in value.items()}
        )
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else _build(args[0], value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ProfileError(f"{where}: expected fields and their values, got {value!r}.")
        _check_body(value, where)
        return dict(value)
    if origin is tuple:
        if not isinstance(value, list):
            raise ProfileError(f"{where}: expected a list, got {value!r}.")
        return tuple(_build(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Literal:
        if value not in args:
            choices = ", ".join(map(repr, args))
            hint = _nearest(str(value), list(map(str, args)))
            raise ProfileError(f"{where}: {value!r} is not one of {choices}.{hint}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        hint = (
            " Write it as 1.0e-5 (YAML 1.1 reads 1e-5 as text)."
            if kind is float and isinstance(value, str)
            else ""
        )
        raise ProfileError(f"{where}: expected {kind.__name__}, got {value!r}.{hint}")
    if kind is float and not math.isfinite(value):
        raise ProfileError(f"{where}: expected a finite number, got {value!r}.")
    return value


# Fields of a request that have keys of their own or that state how its answer is read
_OWN_FIELDS = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "n")


def _check_body(fields: dict, where: str) -> None:
    """Raises ProfileError for fields that a request cannot hold, or that are its own."""
    for name in fields:
        if not isinstance(name, str) or name in _OWN_FIELDS:
            raise ProfileError(
                f"{where}: {name!r} is no field that a profile may add to a request."
            )
    try:
        json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProfileError(f"{where}: expected what JSON can hold ({error}).") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.profile", description="Print a profile as JSON."
    )
    parser.add_argument("name", nargs="?", help="without a name, the known names are listed")
    name = parser.parse_args(argv).name
    try:
        if name is None:
            print("\n".join(profile_names()))
        else:
            print(json.dumps(load_profile(name).as_dict(), indent=2))
    except ProfileError as error:  # as `egm_lib.cli` does, which is a layer above this module
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
