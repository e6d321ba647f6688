"""The names of the files of one run: `Run(profile, seed)`, and `open_run` for notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from egm_lib.files import project_root
from egm_lib.profile import Profile, load_profile

CARD = "published.json"  # marks a folder of published figures, and says what made them


@dataclass(frozen=True)
class Run:
    """One profile and one seed: the folder `data/runs/<profile>-<seed>/` and the files in it."""

    profile: Profile
    seed: int

    @property
    def root(self) -> Path:
        return project_root() / "data" / "runs" / f"{self.profile.name}-{self.seed}"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    def notebook(self, name: str) -> Path:
        return self.root / "notebooks" / name

    def samples(self, name: str) -> Path:
        return self.root / "samples" / f"{name}.jsonl"

    def traces(self, name: str) -> Path:
        return self.root / "traces" / f"{name}.jsonl"

    def log(self, name: str) -> Path:
        return self.root / "logs" / name

    def groups(self, task: str) -> Path:
        return self.root / "groups" / f"{task}.jsonl"

    def checkpoint(self, task: str, model: str) -> Path:
        return self.root / "checkpoints" / task / model

    def predictions(self, model: str, split_id: str) -> Path:
        """split_id: `<dataset>_<split>`, such as `refcoco+_testA`."""
        return self.root / "predictions" / model / f"{split_id}.jsonl"

    def validation(self, model: str) -> Path:
        """A model's answers to the validation split, which is not tested on."""
        return self.root / "validation" / f"{model}.jsonl"

    def prompts(self, model: str) -> Path:
        """With which prompts a model was asked (`egm_lib.pipeline.prompt_ablation`)."""
        return self.root / "ablations" / "prompts" / f"{model}.jsonl"

    @property
    def roots(self) -> list[Path]:
        """The folders of all seeds of the profile that have been run."""
        folders = [Run(self.profile, seed).root for seed in {*self.profile.seeds, self.seed}]
        return sorted(folder for folder in folders if folder.is_dir())

    @property
    def figures(self) -> Path:
        """Tables and figures, shared by the seeds of a profile: `figures/<profile>/`, or beside it
        where the repository holds the published ones, or did until a publication was killed.
        """
        folder = self.published
        yours = folder.with_name(f"{folder.name}-yours")
        return yours if yours.is_dir() or (folder / CARD).exists() else folder

    @property
    def published(self) -> Path:
        """Where `egm_lib.pipeline.publish` stores tables and figures for the repository."""
        return project_root() / "figures" / self.profile.name


def open_run(profile: str, seed: int) -> Run:
    """The run of a profile (by name) and a seed; makes its folder. Notebooks start with it."""
    run = Run(load_profile(profile), seed)
    run.root.mkdir(parents=True, exist_ok=True)
    return run
