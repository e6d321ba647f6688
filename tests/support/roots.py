"""A project root of a test's own."""

import sys
from pathlib import Path

import pytest


def use_root(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Every module of the library that knows `project_root` finds `root`."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "egm_lib" and hasattr(module, "project_root"):
            monkeypatch.setattr(module, "project_root", lambda: root)
