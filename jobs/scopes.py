"""What an API key may be used for."""

from enum import StrEnum


class Scope(StrEnum):
    """A group of requests. A signed-in user has all scopes, an API key those it was made with.

    Who may write webhooks may have an owner's events sent anywhere, and makes the secrets that sign
    them. ``OPERATE`` makes nobody an operator: who is one, the database knows.
    """

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    AUDIO_READ = "audio:read"
    AUDIO_WRITE = "audio:write"
    WEBHOOKS_READ = "webhooks:read"
    WEBHOOKS_WRITE = "webhooks:write"
    OPERATE = "operate"


#: What a key is made for unless somebody says otherwise.
USUAL_SCOPES = frozenset(Scope) - {Scope.WEBHOOKS_WRITE, Scope.OPERATE}
