"""Secrets of a self-hosted Supabase: ``.env`` for docker-compose.yml, from ``.env.example``.

Names and forms are those of Supabase's own self-hosted set-up, so its documentation applies.
"""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from jobs.errors import PgscribeError

Values = Mapping[str, str]

ROLE_TOKEN_SECONDS = 10 * 365 * 24 * 3600
_LINE = re.compile(r"^([A-Z][A-Z0-9_]*)=(.*)$")


class EnvFileRefused(PgscribeError):
    """The file with the secrets was left as it is; the message says why."""

    code = "env_file_refused"


def _password(_: Values) -> str:
    return secrets.token_hex(24)  # stands in URLs, which other characters would break


def _role_token(role: str) -> Callable[[Values], str]:
    def sign(values: Values) -> str:
        now = int(time.time())
        claims = {"role": role, "iss": "supabase", "iat": now, "exp": now + ROLE_TOKEN_SECONDS}
        return jwt.encode(claims, values["JWT_SECRET"], "HS256")

    return sign


def _api_key(kind: str) -> Callable[[Values], str]:
    """Make keys of Supabase's form, the end of which tells a typing error from a key."""

    def make(_: Values) -> str:
        key = f"sb_{kind}_{secrets.token_urlsafe(17)[:22]}"
        digest = hashlib.sha256(f"supabase-self-hosted|{key}".encode()).digest()
        return f"{key}_{base64.urlsafe_b64encode(digest).decode()[:8]}"

    return make


def _signing_keys(values: Values) -> str:
    """Return what Auth signs with, and what it also believes: its own key, and ``JWT_SECRET``."""
    private = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()), as_dict=True)
    own = {"kid": str(uuid4()), "use": "sig", "alg": "ES256", "key_ops": ["sign", "verify"]}
    return _json([private | own, _shared_key(values)])


def _public_keys(values: Values) -> str:
    """Return what the other services believe: the public half of ``JWT_KEYS``, the rest as there.

    The private half must not be among it.
    """
    try:
        keys = [dict(key) for key in json.loads(values["JWT_KEYS"]) if key["kty"] == "EC"]
        for key in keys:
            del key["d"]
            key["key_ops"] = ["verify"]
    except (ValueError, TypeError, KeyError):
        raise EnvFileRefused(
            "JWT_KEYS is no list of private keys: bring it back, or `make-keys --renew JWT_KEYS`"
        ) from None
    return _json({"keys": [*keys, _shared_key(values)]})


def _shared_key(values: Values) -> dict[str, str]:
    secret = base64.urlsafe_b64encode(values["JWT_SECRET"].encode()).rstrip(b"=").decode()
    return {"kty": "oct", "k": secret, "alg": "HS256"}


def _json(value: object) -> str:
    return f"'{json.dumps(value, separators=(',', ':'))}'"


# In this order: later ones are made from earlier ones.
SECRETS: dict[str, Callable[[Values], str]] = {
    "POSTGRES_PASSWORD": _password,
    "AUTHENTICATOR_PASSWORD": _password,
    "AUTH_ADMIN_PASSWORD": _password,
    "STORAGE_ADMIN_PASSWORD": _password,
    "DASHBOARD_PASSWORD": _password,
    "SUPABASE_PUBLISHABLE_KEY": _api_key("publishable"),
    "SUPABASE_SECRET_KEY": _api_key("secret"),
    "JWT_SECRET": lambda _: secrets.token_hex(32),
    "ANON_KEY": _role_token("anon"),
    "SERVICE_ROLE_KEY": _role_token("service_role"),
    "JWT_KEYS": _signing_keys,
    "JWT_JWKS": _public_keys,
    "PG_META_CRYPTO_KEY": lambda _: secrets.token_hex(24),
    "REALTIME_SECRET_KEY_BASE": lambda _: secrets.token_hex(32),
    "REALTIME_DB_ENC_KEY": lambda _: secrets.token_hex(8),
}
# What is made from them has to be made anew with them.
MADE_FROM = {
    "JWT_SECRET": ("ANON_KEY", "SERVICE_ROLE_KEY", "JWT_KEYS", "JWT_JWKS"),
    "JWT_KEYS": ("JWT_JWKS",),
}


def create(template: Path, target: Path) -> list[str]:
    """Write ``target``: the template with a secret of its own wherever it has none.

    Returns the names of the secrets. Raises ``EnvFileRefused`` if there is such a file already.
    """
    text = _read(template)
    filled, made = _fill(text, [name for name in _names(text) if name in SECRETS])
    _write(target, filled, new=True)
    return made


def complete(template: Path, target: Path) -> list[str]:
    """Add to ``target`` what it lacks: lines of the template, and secrets that are empty.

    Returns the names of the secrets that were added; what is there stays as it is.
    """
    with _alone(target):
        text, wanted = _read(target), _read(template)
        here, there = _names(text), _names(wanted)
        lacking = [f"{name}={value}" for name, value in there.items() if name not in here]
        _check_origins(target, here)
        if lacking:
            text = "\n".join([text.rstrip("\n"), "", *lacking, ""])
        filled, made = _fill(text, [name for name in there if name in SECRETS])
        _write(target, filled)
    return made


def _check_origins(target: Path, values: Values) -> None:
    """Raise ``EnvFileRefused`` if what a secret was made from is gone: another would not fit."""
    for origin, made in MADE_FROM.items():
        left = [name for name in made if values.get(name)]
        if left and not values.get(origin):
            raise EnvFileRefused(
                f"{target} has no {origin} any more, from which {', '.join(left)} were made: bring "
                "it back, or empty those as well to have all of them made anew"
            )


def renew(target: Path, names: Iterable[str]) -> list[str]:
    """Replace secrets of ``target``, and what is made from them. Returns all their names."""
    renewed: set[str] = set()
    for name in names:
        if name not in SECRETS:
            known = ", ".join(SECRETS)
            raise EnvFileRefused(f"{name} is no secret that pgscribe makes; those are {known}")
        renewed |= {name, *MADE_FROM.get(name, ())}
    with _alone(target):
        text = _read(target)
        present = _names(text)
        if missing := sorted(renewed - set(present)):
            raise EnvFileRefused(
                f"{target} has no line for {', '.join(missing)}: run `pgscribe make-keys --missing`"
            )
        emptied = "".join(
            f"{found[1]}=\n"
            if (found := _LINE.match(line)) and found[1] in renewed
            else f"{line}\n"
            for line in text.splitlines()
        )
        filled, made = _fill(emptied, renewed)
        _write(target, filled)
    return made


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Let others wait who change the file, too: each would undo what the other has done."""
    folder = os.open(target.resolve().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _names(text: str) -> dict[str, str]:
    return {found[1]: found[2] for line in text.splitlines() if (found := _LINE.match(line))}


def _fill(text: str, names: Iterable[str]) -> tuple[str, list[str]]:
    """Return the text with a value for each of the names that has none, and which those were."""
    values = {name: value.strip("'\"") for name, value in _names(text).items()}
    made = [name for name in SECRETS if name in set(names) and not values.get(name)]
    quoted = {}
    for name in made:
        quoted[name] = SECRETS[name](values)
        values[name] = quoted[name].strip("'")
    lines = [
        f"{found[1]}={quoted[found[1]]}"
        if (found := _LINE.match(line)) and found[1] in quoted and not found[2].strip("'\"")
        else line
        for line in text.splitlines()
    ]
    return "\n".join([*lines, ""]), made


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EnvFileRefused(
            f"There is no {path}. Run this in a folder with pgscribe's docker-compose.yml and "
            ".env.example, `pgscribe make-keys` before its other forms"
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise EnvFileRefused(f"{path} can't be read: {exc}") from None


def _write(path: Path, text: str, *, new: bool = False) -> None:
    """Write a file that only its owner reads, as a whole or not at all."""
    path = path if new else path.resolve()  # what a link leads to, not the link
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if new:
            path.hardlink_to(draft)  # fails where there is one
        else:
            draft.replace(path)
    except FileExistsError:
        raise EnvFileRefused(
            f"{path} exists, and the database was made with its passwords: it is left as it is. "
            "--missing adds what it lacks, --renew NAME replaces a secret; to begin anew, move it "
            "away"
        ) from None
    except OSError as exc:
        raise EnvFileRefused(f"{path} can't be written: {exc.strerror}") from exc
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
