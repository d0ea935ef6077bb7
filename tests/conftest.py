"""Fixtures that several tests share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from runtime.demo_models import write_demo_models
from tests.tiny import write_tiny

TinyCheckpoint = Callable[..., Path]

# A busy machine is no failure, and a suite that passes once passes again.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# A shell's background job ignores Ctrl-C, and so would this process and all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run wherever there is a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """tiny_checkpoint("mixtral", shards=True, tie_word_embeddings=True) -> folder; written once per session."""
    written: dict[str, Path] = {}

    def folder(family: str, **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in written:
            written[key] = write_tiny(tmp_path_factory.mktemp(family), family, **changes)
        return written[key]

    return folder


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the demonstration models by name, written once per session (seconds, 0.7 GB)."""
    return write_demo_models(tmp_path_factory.mktemp("demo"))
