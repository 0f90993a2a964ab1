"""Secrets as `pgscribe make-keys` makes them."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from dotenv import dotenv_values

from jobs import self_hosting
from tests.conftest import REPO


@pytest.fixture(scope="session")
def env_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("self-hosting") / ".env"
    self_hosting.create(REPO / ".env.example", path)
    return path


@pytest.fixture(scope="session")
def keys(env_file: Path) -> Mapping[str, str]:
    return {name: value or "" for name, value in dotenv_values(env_file).items()}
