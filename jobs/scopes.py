"""What an API key may be used for."""

from enum import StrEnum


class Scope(StrEnum):
    """A group of requests. A signed-in user has all scopes, an API key those it was made with.

    ``OPERATE`` makes nobody an operator: who is one, the database knows.
    """

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    AUDIO_READ = "audio:read"
    AUDIO_WRITE = "audio:write"
    OPERATE = "operate"


#: What a key is made for unless somebody says otherwise.
USUAL_SCOPES = frozenset(Scope) - {Scope.OPERATE}
