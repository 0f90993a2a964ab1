"""What a local Modal serves, and how patient it is."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self
from uuid import uuid4

WEEK = 7 * 24 * 3600.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``apps`` are "module:variable"; ``functions`` maps "app/name" to "module:function"."""

    apps: tuple[str, ...] = ()
    functions: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    token_id: str = "ak-local"
    token_secret: str = "as-local"
    containers: int = 2  # of a function without max_containers; at Modal there is no limit
    scaledown_window: float = 60.0  # seconds, for a function without one
    result_ttl: float = WEEK
    max_crashes: int | None = None  # of one call's containers; Modal starts it again for ever
    init_attempts: int = 2  # containers that may fail to start before the waiting calls fail
    cancel_grace: float = 1.0  # seconds from a cancelled input's exception to its container's end
    streams: int = 10_000  # open requests of one connection; what Modal allows is not known
    container_environment: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        return cls(**values | {"apps": tuple(values["apps"])})


def new_id(prefix: str) -> str:
    """Return an id that no other server gives, as a client may outlive this one."""
    return f"{prefix}-{uuid4().hex[:22]}"
