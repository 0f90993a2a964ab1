"""Deploys apps with the real client, to whatever server the environment names."""

import importlib
import sys

import modal

from tests.local_modal.settings import Settings


def load(target: str) -> object:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def app_of(target: str) -> modal.App:
    app = load(target)
    assert isinstance(app, modal.App), f"{target} is no modal.App"
    return app


def apps_of_functions(settings: Settings) -> dict[str, modal.App]:
    """Wrap plain functions that no app has decorated."""
    apps: dict[str, modal.App] = {}
    for path, target in settings.functions.items():
        app_name, _, name = path.partition("/")
        app = apps.setdefault(app_name, modal.App(app_name))
        function = load(target)
        assert callable(function), f"{target} is no function"
        app.function(name=name)(function)
    return apps


def main() -> None:
    settings = Settings.from_json(sys.argv[1])
    for app in [*map(app_of, settings.apps), *apps_of_functions(settings).values()]:
        app.deploy()


if __name__ == "__main__":
    main()
