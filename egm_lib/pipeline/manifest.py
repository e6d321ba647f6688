"""The manifest of a run: what ran, with which revisions, on what, for how long."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

from egm_lib.files import digest, file_digest, project_root, read_json, write_text
from egm_lib.pipeline.publish import ReproduceError
from egm_lib.run import Run

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "vllm",
    "deepspeed",
    "numpy",
    "papermill",
)
MAY_CHANGE = ("values.curation.budget_usd",)  # while a run goes on: it changes no result


def open_manifest(run: Run) -> dict:
    """The run's manifest, new or as it was left; profile and base models must be those that the run
    began with.
    """
    values = json.loads(json.dumps(run.profile.as_dict()))
    manifest = {
        "profile": run.profile.name,
        "seed": run.seed,
        "values": values,
        "models": _model_revisions(run),
    }
    manifest |= {"stages": {}, "wall_seconds": {}}
    if run.manifest.exists():
        now = manifest
        parts = dict.fromkeys(("values", "models", "stages", "wall_seconds"), dict)
        advice = "delete it, and the run continues with its files"
        manifest = read_json(run.manifest, advice, shape=dict, fields=parts)
        for name, stage in manifest["stages"].items():
            if not _is_stage(stage):
                raise ReproduceError(f"{run.manifest}: stage {name!r} is not a record; {advice}")
        changed = [
            text for key in ("values", "models") for text in _changes(manifest[key], now[key], key)
        ]
        if changed:
            raise ReproduceError(
                f"{run.root} was started with another profile or other base models: "
                f"{'; '.join(changed)}. Delete that "
                "folder to start over, or undo these changes."
            )
    else:
        manifest |= environment()
    write_manifest(run, manifest)
    return manifest


def _is_stage(stage: object) -> bool:
    """Whether a value is what `reproduce` records of a stage."""
    kinds = {"key": str, "finished": bool, "seconds": int | float, "files": list}
    return isinstance(stage, dict) and all(
        isinstance(stage.get(name), kind) for name, kind in kinds.items()
    )


def environment() -> dict:
    """By which revision, with what and on what a stage runs, under which protocol (its SHA-256)."""
    protocol = project_root() / "docs" / "protocol.md"
    return {
        "git": git_revision(),
        "versions": _versions(),
        "hardware": _hardware(),
        "protocol": file_digest(protocol) if protocol.exists() else None,
    }


def _changes(old: object, new: object, where: str = "") -> list[str]:
    if where in MAY_CHANGE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            text
            for key in keys
            for text in _changes(old.get(key), new.get(key), f"{where}.{key}".strip("."))
        ]
    return [] if old == new else [f"{where} was {old!r}, is {new!r}"]


def write_manifest(run: Run, manifest: dict) -> None:
    data = sorted(run.profile.data.path.rglob("*.jsonl"))
    manifest["data"] = {
        "root": run.profile.data.root,
        "files": {path.name: file_digest(path)[:16] for path in data},
    }
    write_text(run.manifest, json.dumps(manifest, indent=1))


def _model_revisions(run: Run) -> dict[str, str | None]:
    """Of a local checkpoint the digest of its weights, of a hub id its revision (None: the
    newest).
    """
    return {
        role: _weights_digest(Path(model.location)) or model.revision
        for role, model in run.profile.models.by_role().items()
    }


def _weights_digest(folder: Path) -> str | None:
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return digest([file_digest(path)[:16] for path in files])[:16] if files else None


def committed_json(path: str) -> dict | None:
    """A JSON object in a file of the checkout's last commit; None outside a checkout, and without
    such a file.
    """
    show = ["git", "-C", str(project_root()), "show", f"HEAD:{path}"]
    try:
        value = json.loads(subprocess.run(show, capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def git_revision() -> str:
    """The revision of the checkout, "-dirty" where it has changes, figures apart: runs write them;
    or "unknown".
    """
    git = ["git", "-C", str(project_root())]
    try:
        revision = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        same = (
            subprocess.run(
                [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)figures"]
            ).returncode
            == 0
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision.stdout.strip() + ("" if same else "-dirty")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _hardware() -> dict[str, object]:
    import torch

    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_gb, 1),
        "gpus": gpus,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
