"""A playground on the models of a run, in a notebook or in JupyterLab.

python -m egm_lib.pipeline.playground --profile mini
"""

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import nbformat

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.data import eval_splits, read_eval, split_id
from egm_lib.errors import InputError
from egm_lib.files import atomic_open, project_root
from egm_lib.inference.engine import Engine
from egm_lib.inference.from_profile import make_engine, model_of
from egm_lib.mini.world import recipes, samples
from egm_lib.profile import Model
from egm_lib.run import Run
from egm_lib.viewer import Playground
from egm_lib.viewer.playground import MAX_MODELS

NUM_SAMPLES = 60
MODELS = ("small-base", "small-egm", "reference", "large-base")


def playground(
    run: Run, models: Sequence[str] | None = None, task: str | None = None, **traits
) -> Playground:
    """A playground with a run's models on its engine.

    models: their names; default: the profile's base models and those of MODELS that were trained
    here, each checkpoint once.
    task: "vanilla" or "amodal"; default: the profile's first.
    In the miniature the images are validation scenes, whose objects can be dragged; elsewhere they
    are the first samples of the task's first split. A model is loaded when it is first asked.
    Raises InputError for a name without a checkpoint.
    """
    profile, task = run.profile, task or run.profile.tasks[0]
    found = {name: _checkpoint(run, name, task) for name in models or MODELS}
    if models and (missing := [name for name in models if found[name] is None]):
        raise InputError(f"no checkpoint of {', '.join(missing)} in {run.root}; train it first")
    here: dict[str, Model] = {}
    for name, model in found.items():
        if model is not None and model not in here.values():
            here[name] = model
    mini = profile.data.source == "mini"
    return Playground(
        {name: partial(_engine, run, model) for name, model in here.items()},
        profile.generation.sampling,
        samples=_scenes(task) if mini else _first_samples(run, task),
        arrangement=(lambda sample: sample["scene"]) if mini else lambda sample: None,
        root=profile.data.path,
        task=task,
        prompt=profile.evaluation.prompt,
        engines_held=1 if profile.generation.engine == "vllm" else MAX_MODELS,
        **traits,
    )


def _engine(run: Run, model: Model) -> Engine:
    if run.profile.data.source == "mini":
        import torch  # only here: an evaluation shows the playground without it

        # Its matrices are too small for several threads, which on a busy machine only wait
        torch.set_num_threads(1)
    return make_engine(run.profile, model, run.seed)


def _checkpoint(run: Run, name: str, task: str) -> Model | None:
    """The checkpoint of a model; None if the run has not trained it."""
    try:
        return model_of(run, name, task)
    except FileNotFoundError:
        return None


def _scenes(task: str) -> list[dict]:
    """Samples of the miniature's validation scenes, each with its scene."""
    amodal = f"eval/{split_id(*eval_splits('amodal')[0])}.jsonl"
    name = "validation.jsonl" if task == "vanilla" else amodal
    return [
        row | {"scene": scene, "image": scene.image()}
        for scene, _, rows, _ in samples(recipes()[name], NUM_SAMPLES)
        for row in rows
    ]


def _first_samples(run: Run, task: str) -> list[dict]:
    split = eval_splits(task)[0]
    return list(read_eval(run.profile.data.path, *split, NUM_SAMPLES))


_HOW_TO = """# Playground

Run the cell below (Shift+Enter). Type what is to be found, and ask. Drag an object, and ask again.
Edit the reasoning of a model, and let it continue from there."""


def write_notebook(run: Run) -> Path:
    """A notebook with nothing but the playground, in the folder of the run."""
    code = (
        "from egm_lib.pipeline.playground import playground\n"
        "from egm_lib.run import open_run\n\n"
        f"playground(open_run({run.profile.name!r}, {run.seed}))"
    )
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(_HOW_TO),
            nbformat.v4.new_code_cell(code),
        ]
    )
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    path = run.root / "playground.ipynb"
    with atomic_open(path) as file:
        nbformat.write(notebook, file)
    return path


def main(argv: list[str] | None = None) -> int:
    args = run_parser("pipeline.playground", "Open a playground in JupyterLab.").parse_args(argv)
    return ends(lambda: _open(run_of(args)))


def _open(run: Run) -> None:
    path = write_notebook(run).relative_to(project_root())
    subprocess.run([sys.executable, "-m", "jupyterlab", path], cwd=project_root(), check=False)


if __name__ == "__main__":
    sys.exit(main())
