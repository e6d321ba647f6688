"""The layers of the library: imports run one way, and the ideas at the top need no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import egm_lib

ROOT = Path(egm_lib.__file__).parent
# From the bottom up; a module imports its own layer and those below it (docs/architecture.md).
LAYERS = (
    ("boxes", "loss", "learnability", "model_shapes", "devices", "files", "errors"),
    ("prompts", "scoring_rules", "profile"),
    ("parsing", "run", "data", "cli"),
    ("reward", "curation"),
    ("inference", "viewer"),
    ("evaluation", "mini"),
    ("training",),
    ("sft", "grpo", "reports"),
    ("pipeline", "notebook"),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
# The miniature's teacher is a service like any other, and its transport is made in process.
UPWARD = {("curation/services.py", "mini")}
WITHOUT_TORCH = (
    "boxes",
    "parsing",
    "scoring_rules",
    "prompts",
    "reward",
    "learnability",
    "model_shapes",
    "devices",
)


def imported(path: Path) -> set[str]:
    """Folders and modules of egm_lib, and packages outside it, that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            found.add(rest.partition(".")[0] if package == "egm_lib" else package)
    return found


def test_every_module_has_its_layer():
    parts = {path.stem for path in ROOT.glob("*.py")} | {
        path.parent.name for path in ROOT.glob("*/*.py")
    }
    assert parts - {"__init__", "__pycache__"} == set(LAYER_OF)


def test_imports_run_one_way():
    upward = set()
    for path in ROOT.rglob("*.py"):
        file = path.relative_to(ROOT)
        part = file.parts[0].removesuffix(".py")
        for other in imported(path) & set(LAYER_OF):
            if part in LAYER_OF and LAYER_OF[other] > LAYER_OF[part]:
                upward.add((file.as_posix(), other))
    assert upward == UPWARD


def test_no_two_parts_import_each_other():
    edges = {
        (path.relative_to(ROOT).parts[0].removesuffix(".py"), other)
        for path in ROOT.rglob("*.py")
        for other in imported(path) & set(LAYER_OF)
        if (path.relative_to(ROOT).as_posix(), other) not in UPWARD
    }
    assert not [(a, b) for a, b in edges if a < b and (b, a) in edges]


def test_the_ideas_need_no_torch():
    for name in WITHOUT_TORCH:
        pending, seen = [name], set()
        while pending:
            part = pending.pop()
            found = imported(ROOT / f"{part}.py")
            assert "torch" not in found, f"{name} reaches torch through {part}"
            seen.add(part)
            pending += [
                other for other in found & set(LAYER_OF) - seen if (ROOT / f"{other}.py").exists()
            ]


@pytest.mark.parametrize(
    "module", ["egm_lib.notebook", "egm_lib.training.selection", "egm_lib.pipeline.playground"]
)
def test_what_notebooks_show_needs_no_library_of_models(module):
    heavy = "{'torch', 'transformers', 'peft', 'openai'}"
    code = f"import sys, {module}; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", "every kernel would load it, for some seconds each"
