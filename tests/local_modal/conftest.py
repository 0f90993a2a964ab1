import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.local_modal.fixtures import local_modal, local_modal_server, modal_client
from tests.local_modal.sample_app import APP
from tests.local_modal.settings import Settings

__all__ = ["local_modal", "local_modal_server", "modal_client"]


@pytest.fixture(scope="session")
def local_modal_settings() -> Settings:
    return Settings(
        apps=(APP,),
        functions={"plain/dumps": "json:dumps"},
        cancel_grace=0.5,
    )
