"""A port of a test's own, so that two runs of the suite can stand beside each other."""

import socket

import pytest


def use_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the test starts meet at a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
