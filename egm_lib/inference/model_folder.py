"""What a model folder holds, said in a sentence before transformers or vLLM reads it.

Nothing here runs code of a checkpoint or opens a pickle.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from egm_lib.errors import InputError
from egm_lib.files import project_root, read_json
from egm_lib.prompts import FAMILIES

CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
# `model_type` of each family's checkpoints: dense and mixture of experts
MODEL_TYPES = {"qwen3-vl": ("qwen3_vl", "qwen3_vl_moe"), "internvl-3": ("internvl",)}
LFS_POINTER = b"version https://git-lfs"
COPY_AGAIN = "copy it again from where the model came from"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found.

    place: the folder or hub id of the whole model. config: its config.json. adapter: the folder of
    a LoRA adapter that was trained on it.
    """

    place: str
    config: dict
    revision: str | None = None  # of a hub id
    adapter: Path | None = None

    @property
    def folder(self) -> Path | None:
        """None for a hub id."""
        return Path(self.place) if Path(self.place).is_dir() else None

    @property
    def hub(self) -> dict[str, str]:
        """The options of `from_pretrained` that choose a version."""
        return {} if self.revision is None else {"revision": self.revision}


def find_checkpoint(
    path: str | Path, revision: str | None = None, family: str | None = None
) -> Checkpoint:
    """The checkpoint at a path or under a hub id; that of a LoRA adapter is its base.

    family: of egm_lib.prompts.FAMILIES; None: any of them.
    Raises FileNotFoundError where a local folder has no checkpoint, InputError for one that this
    library cannot use, and OSError where a hub id is out of reach.
    """
    if family is not None and family not in FAMILIES:
        raise InputError(f"unknown model family {family!r}: use one of {', '.join(FAMILIES)}")
    if not _is_local(str(path)):
        config, _ = PretrainedConfig.get_config_dict(str(path), revision=revision)
        found = Checkpoint(str(path), config, revision)
    else:
        folder = Path(path)
        _refuse_other_files(folder)
        if (folder / ADAPTER).is_file():
            return _base_of(folder, family)
        if not (folder / CONFIG).is_file():
            raise _without_config(folder)
        found = Checkpoint(str(path), _json(folder / CONFIG))
    _check_kind(found, family)
    return found


def check_weights(found: Checkpoint) -> None:
    """Raises InputError unless all weights of a local checkpoint are there, whole and safetensors.

    Of each file the header is read, and that the file is as long as it says.
    """
    if found.folder is not None:
        _check_safetensors(_weight_files(found.folder))
    if found.adapter is not None:
        file = found.adapter / ADAPTER_WEIGHTS
        if not file.is_file():
            raise InputError(
                f"{found.adapter} holds no {ADAPTER_WEIGHTS}, the weights of its LoRA adapter: "
                "save the adapter with peft's save_pretrained; other formats are not read"
            )
        _check_safetensors([file])


def check_plain(found: Checkpoint) -> None:
    """Raises InputError for quantised weights, which only vLLM reads here."""
    stated = found.config.get("quantization_config") or found.config.get("compression_config")
    if not stated:
        return
    kind = stated.get("quant_method") if isinstance(stated, dict) else None
    raise InputError(
        f"{found.place} holds weights quantised by {kind or 'an unnamed method'}. transformers "
        "computes here with plain ones, on a CPU and on a GPU, and so do SFT and GRPO: take the "
        "checkpoint that it was made from. Or set generation.engine to vllm, which answers with "
        "quantised weights on a GPU that its kernels for the method support"
    )


def check_whole(found: Checkpoint, user: str) -> None:
    """Raises InputError for a LoRA adapter. user: who reads whole models only, such as vLLM."""
    if found.adapter is not None:
        raise InputError(
            f"{found.adapter} holds a LoRA adapter, and {user} needs a whole model: merge it into "
            f"{found.place} with peft's merge_and_unload, save model and processor, and give that "
            "folder"
        )


def check_processor(found: Checkpoint, folder: Path) -> None:
    """Raises InputError unless a folder holds a tokenizer and the processing of images."""
    stated = _json(folder / "processor_config.json") or {}
    images = _json(folder / "preprocessor_config.json") or stated.get("image_processor")
    _json(folder / "tokenizer_config.json")
    whole = (folder / "tokenizer.json").is_file()  # 11 MB, which the tokenizer's loader reads
    pairs = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    lacks = []
    if not whole and not pairs:
        lacks.append("tokenizer.json")
    if not images:
        lacks.append("preprocessor_config.json")
    of_internvl = found.config.get("model_type") in MODEL_TYPES["internvl-3"]
    if of_internvl and "image_seq_length" not in stated:
        lacks.append("processor_config.json with image_seq_length")
    if lacks:
        raise InputError(
            f"{folder} lacks {' and '.join(lacks)}: copy the files of tokenizer and processor "
            "there from the model that it was made from"
        )


def _is_local(text: str) -> bool:
    return text.startswith((".", "/", "~", "data/")) or os.sep in text and Path(text).exists()


def _json(file: Path) -> dict | None:
    return read_json(file, COPY_AGAIN, shape=dict)


def _named(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _refuse_other_files(folder: Path) -> None:
    """Raises InputError for a path that is not a folder, and for files that stand for others."""
    if str(folder).startswith("~"):
        raise InputError(f"{folder}: write the path in full, without ~")
    if folder.suffix == ".gguf":
        raise InputError(
            f"{folder} is a GGUF file, for llama.cpp: give the folder of the checkpoint in "
            "safetensors that it was made from"
        )
    if folder.is_file():
        raise InputError(f"{folder} is a file: give the folder that holds {CONFIG} and the weights")
    files = list(folder.iterdir()) if folder.is_dir() else []
    if broken := [file.name for file in files if file.is_symlink() and not file.exists()]:
        raise InputError(
            f"{folder} holds links to missing files ({_named(broken)}): download the model again"
        )
    if pointers := [file.name for file in files if _starts_with(file, LFS_POINTER)]:
        raise InputError(
            f"{folder} holds pointers of Git LFS instead of files ({_named(pointers)}): run "
            "`git lfs install` and `git lfs pull` there"
        )


def _starts_with(file: Path, mark: bytes) -> bool:
    if not file.is_file():
        return False
    with open(file, "rb") as opened:
        return opened.read(len(mark)) == mark


def _without_config(folder: Path) -> Exception:
    """The sentence for a folder without config.json."""
    if any(folder.glob("*.gguf")):
        return InputError(
            f"{folder} holds GGUF weights, for llama.cpp: give the folder of the checkpoint in "
            "safetensors that they were made from"
        )
    if any(folder.glob("global_step*")) or any(folder.glob("*.distcp")):
        return InputError(
            f"{folder} holds the divided state of a training (DeepSpeed or FSDP), not a model: "
            "gather it first (zero_to_fp32.py, or `accelerate merge-weights`)"
        )
    inner = [folder, *folder.glob("*"), *folder.glob("snapshots/*")]
    if models := [str(place) for place in inner if (place / CONFIG).is_file()]:
        return InputError(f"{folder} has its {CONFIG} in a folder below: give {models[0]}")
    return FileNotFoundError(
        f"no checkpoint in {folder} ({CONFIG} is missing): run the stage that makes it, "
        "or restore the shipped one with `git checkout -- data/mini`"
    )


def _base_of(adapter: Path, family: str | None) -> Checkpoint:
    """The checkpoint that a LoRA adapter belongs to."""
    if (adapter / CONFIG).is_file():
        raise InputError(
            f"{adapter} holds both a whole model ({CONFIG}) and a LoRA adapter ({ADAPTER}): "
            "move one of them to another folder"
        )
    stated = _json(adapter / ADAPTER)
    kind, base = stated.get("peft_type"), stated.get("base_model_name_or_path")
    if kind != "LORA":
        raise InputError(
            f"{adapter} holds an adapter of kind {kind!r}: only LORA can be merged into its base"
        )
    mend = f"set base_model_name_or_path in {adapter / ADAPTER} to the folder or hub id of its base"
    if not isinstance(base, str) or not base:
        raise InputError(f"{adapter} holds a LoRA adapter that names no base model: {mend}")
    local = project_root() / base  # an absolute path stays as it is
    if local.exists():
        base = str(local)
    elif _is_local(base) or base.count("/") != 1:
        raise InputError(f"{adapter} holds a LoRA adapter on {base}, which is missing: {mend}")
    if local.exists() and (local / ADAPTER).is_file():
        raise InputError(
            f"{adapter} holds a LoRA adapter on {base}, which is a LoRA adapter itself: merge that "
            f"into its base first, then {mend}"
        )
    found = find_checkpoint(base, stated.get("revision"), family)
    return Checkpoint(found.place, found.config, found.revision, adapter)


def _check_kind(found: Checkpoint, family: str | None) -> None:
    """Raises InputError for a model that is not of a family's kind. The first reason is given."""
    place, kind = found.place, found.config.get("model_type")
    wanted = [family] if family else list(MODEL_TYPES)
    if kind in [name for each in wanted for name in MODEL_TYPES[each]]:
        if not found.config.get("vision_config"):
            raise InputError(f"{place} has no vision_config in its {CONFIG}: {COPY_AGAIN}")
        return
    of_family = [each for each, names in MODEL_TYPES.items() if kind in names]
    if of_family:
        raise InputError(
            f"{place} is a model of family {of_family[0]} (model_type {kind!r}), and the profile "
            f"says {family}: set its `family` to {of_family[0]}, or its `path` to another model"
        )
    if kind == "internvl_chat":
        name = "OpenGVLab/InternVL3-8B-hf" if found.folder else f"{place}-hf"
        raise InputError(
            f"{place} is InternVL in the form that needs custom code (auto_map), which is "
            f"never run here: take the repository whose name ends in -hf, such as {name}"
        )
    if "auto_map" in found.config:
        raise InputError(
            f"{place} needs custom code (auto_map in its {CONFIG}), which is never run here: "
            f"take a checkpoint of {_families()}"
        )
    if "vision_config" not in found.config:
        raise InputError(
            f"{place} is a text-only model (model_type {kind!r}, no vision_config): "
            f"grounding needs a vision-language model; take a checkpoint of {_families()}"
        )
    raise InputError(
        f"{place} has no prompt format here (model_type {kind!r}): take a "
        f"checkpoint of {_families()}"
    )


def _families() -> str:
    return " or ".join(f"{name} (model_type {kinds[0]})" for name, kinds in MODEL_TYPES.items())


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads: one, or the shards of an index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        stated = _json(index)
        weight_map = stated.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or "metadata" not in stated:
            raise InputError(f"{index} lacks weight_map or metadata: {COPY_AGAIN}")
        shards = set(map(str, weight_map.values()))
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise InputError(
                f"{folder} lacks {len(missing)} of the {len(shards)} files of its weights "
                f"({_named(missing)}): download them again"
            )
        return [folder / name for name in sorted(shards)]
    if shards := [file.name for file in folder.glob("model-*.safetensors")]:
        raise InputError(
            f"{folder} holds weights in several files ({_named(shards)}) without {index.name}, "
            f"which says what is where: {COPY_AGAIN}"
        )
    if pickles := [file.name for end in ("bin", "pt", "pth") for file in folder.glob(f"*.{end}")]:
        raise InputError(
            f"{folder} holds pickles ({_named(pickles)}), which can run code and are not read: "
            "take the checkpoint in safetensors, or convert it where you trust it"
        )
    raise InputError(f"{folder} holds no weights ({WEIGHTS} is missing): download them again")


def _check_safetensors(files: Iterable[Path]) -> None:
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise InputError(
                f"{file} is incomplete, or not a safetensors file ({error}): {COPY_AGAIN}"
            ) from error
