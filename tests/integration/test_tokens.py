"""Tokens by public key and by secret, and every way to forge one that we know of."""

import base64
import json
import logging
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from starlette.testclient import TestClient

from jobs.errors import SettingsError
from jobs.settings import Settings
from tests.jwks_server import JwksServer, SigningKey, ec_key, rsa_key, serve
from web.app import create_app
from web.auth import MAX_TOKEN, issue_token

Claims = dict[str, Any]


@pytest.fixture
def auth() -> Iterator[JwksServer]:
    with serve() as server:
        server.keys = [ec_key(), rsa_key()]
        yield server


@pytest.fixture
def project(settings: Settings, auth: JwksServer) -> Settings:
    """Settings of a project that signs with public keys and still has its old secret."""
    return settings.model_copy(update={"supabase_url": auth.url, "failed_rate_limit": 0})


@pytest.fixture
def api(project: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(project)) as client:
        yield client


@pytest.fixture
def claims(auth: JwksServer, user: UUID) -> Claims:
    return {
        "sub": str(user),
        "aud": "authenticated",
        "iss": f"{auth.url}/auth/v1",
        "role": "authenticated",
        "iat": int(time.time()),
        "exp": int(time.time()) + 60,
    }


def ask(api: TestClient, token: str) -> Any:
    return api.get("/jobs", headers={"Authorization": f"Bearer {token}"})


def encoded(part: Any) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def with_header(token: str, **changes: Any) -> str:
    """The token with another header and the signature as it was."""
    header, payload, signature = token.split(".")
    old = json.loads(base64.urlsafe_b64decode(header + "=="))
    return f"{encoded(old | changes)}.{payload}.{signature}"


def public_pem(key: SigningKey) -> bytes:
    return key.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def signed_with(secret: bytes, header: Claims, claims: Claims) -> str:
    """An HS256 token that PyJWT would refuse to make."""
    signed = f"{encoded(header)}.{encoded(claims)}"
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(
        signed.encode(), secret
    )
    return f"{signed}.{encoded(signature)}"


def test_public_keys_and_the_secret_are_good_at_once(
    api: TestClient, auth: JwksServer, project: Settings, claims: Claims
) -> None:
    tokens = [key.sign(claims) for key in auth.keys]
    tokens.append(issue_token(project, UUID(claims["sub"]), lifetime=60))
    assert [ask(api, token).status_code for token in tokens] == [200, 200, 200]
    assert len(auth.paths) == 1


def test_keys_rotate(api: TestClient, auth: JwksServer, claims: Claims) -> None:
    auth.keys = [auth.keys[0]]
    new = ec_key()
    assert ask(api, new.sign(claims)).status_code == 401
    assert ask(api, auth.keys[0].sign(claims)).status_code == 200


def test_without_a_secret_none_is_taken(
    settings: Settings, project: Settings, auth: JwksServer, claims: Claims
) -> None:
    token = issue_token(project, UUID(claims["sub"]), lifetime=60)
    # Local storage would need the secret for its links.
    hosted = {"jwt_secret": None, "storage": "supabase", "supabase_secret_key": project.jwt_secret}
    with TestClient(create_app(project.model_copy(update=hosted))) as api:
        assert ask(api, token).status_code == 401
        assert ask(api, auth.keys[0].sign(claims)).status_code == 200
    with TestClient(create_app(settings)) as api:
        response = ask(api, auth.keys[0].sign(claims))
    assert response.status_code == 401
    assert "algorithm" in response.json()["detail"]


def test_while_keys_have_never_been_there_nobody_is_refused_for_good(
    api: TestClient, auth: JwksServer, project: Settings, claims: Claims
) -> None:
    auth.status = 503
    response = ask(api, auth.keys[0].sign(claims))
    assert response.status_code == 503
    assert response.json()["code"] == "signing_keys_unavailable"
    assert response.headers["retry-after"] == "5"
    by_secret = issue_token(project, UUID(claims["sub"]), lifetime=60)
    assert ask(api, by_secret).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"exp": -11},
        {"nbf": 20},
        {"iat": 20},
        {"exp": None},
        {"exp": "soon"},
        {"exp": float("inf")},
        {"exp": []},
        {"nbf": {}},
        {"aud": "anon"},
        {"aud": None},
        {"aud": ["anon"]},
        {"iss": "https://elsewhere.example/auth/v1"},
        {"iss": None},
        {"iss": ["https://elsewhere.example/auth/v1"]},
        {"sub": None},
        {"sub": 7},
        {"sub": "' or true --"},
        {"name": "\0"},
        {"name": "\ud800"},
        {"name": float("inf")},
    ],
    ids=str,
)
@pytest.mark.parametrize("number", [0, 1])
def test_claims_are_checked(
    api: TestClient, auth: JwksServer, claims: Claims, change: Claims, number: int
) -> None:
    now = int(time.time())
    for name, value in change.items():
        relative = name in {"exp", "nbf", "iat"} and isinstance(value, int)
        claims[name] = now + value if relative else value
    claims = {name: value for name, value in claims.items() if value is not None}
    key = auth.keys[number]
    header = {"alg": key.algorithm, "kid": key.id, "typ": "JWT"}
    token = jwt.api_jws.PyJWS().encode(
        json.dumps(claims).encode(), key.private, key.algorithm, header
    )
    response = ask(api, token)
    assert response.status_code == 401, response.text
    assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'


@pytest.mark.parametrize("change", [{"exp": -5}, {"nbf": 5}, {"iat": 5}], ids=str)
def test_clocks_may_differ_a_little(
    api: TestClient, auth: JwksServer, claims: Claims, change: dict[str, int]
) -> None:
    claims |= {name: int(time.time()) + value for name, value in change.items()}
    assert ask(api, auth.keys[0].sign(claims)).status_code == 200


@pytest.mark.parametrize("role", ["anon", "service_role", "supabase_admin", "", None])
def test_other_roles_are_refused(
    api: TestClient, auth: JwksServer, claims: Claims, role: str | None
) -> None:
    response = ask(api, auth.keys[0].sign(claims | {"role": role}))
    assert response.status_code == 403


def test_a_public_key_is_never_a_secret(api: TestClient, auth: JwksServer, claims: Claims) -> None:
    for key in auth.keys:
        for secret in (public_pem(key), public_pem(key).strip(), json.dumps(key.jwk).encode()):
            for header in ({"alg": "HS256", "kid": key.id}, {"alg": "HS256"}):
                assert ask(api, signed_with(secret, header, claims)).status_code == 401


@pytest.mark.parametrize("secret", [b"", b"\0", b"secret", b"null", b"None"])
def test_guessed_secrets(api: TestClient, claims: Claims, secret: bytes) -> None:
    assert ask(api, signed_with(secret, {"alg": "HS256"}, claims)).status_code == 401


@pytest.mark.parametrize(
    "algorithm", ["none", "None", "nOnE", "", None, 7, [], {}, "HS512", "PS256", "ES384", "EdDSA"]
)
def test_other_algorithms(
    api: TestClient, auth: JwksServer, claims: Claims, algorithm: Any
) -> None:
    unsigned = f"{encoded({'alg': algorithm, 'kid': auth.keys[0].id})}.{encoded(claims)}."
    assert ask(api, unsigned).status_code == 401
    for key in auth.keys:
        assert ask(api, with_header(key.sign(claims), alg=algorithm)).status_code == 401


def test_a_key_has_one_algorithm(api: TestClient, auth: JwksServer, claims: Claims) -> None:
    by_ec, by_rsa = auth.keys
    assert ask(api, by_ec.sign(claims, kid=by_rsa.id)).status_code == 401
    assert ask(api, by_rsa.sign(claims, kid=by_ec.id)).status_code == 401


def test_tokens_do_not_bring_their_own_keys(
    api: TestClient, auth: JwksServer, claims: Claims
) -> None:
    with serve() as evil:
        own = ec_key()
        evil.keys = [own]
        url = f"{evil.url}/auth/v1/.well-known/jwks.json"
        for headers in (
            {"jwk": own.jwk},
            {"jku": url},
            {"x5u": url},
            {"x5c": ["MIIB"]},
            {"jwk": own.jwk, "kid": auth.keys[0].id},
            {"jku": url, "kid": auth.keys[0].id},
            {"kid": url},
        ):
            assert ask(api, own.sign(claims, **headers)).status_code == 401
        own_issuer = claims | {"iss": f"{evil.url}/auth/v1"}
        assert ask(api, own.sign(own_issuer)).status_code == 401
        assert evil.paths == []


@pytest.mark.parametrize(
    "key_id",
    [
        "../../../../dev/null",
        "/etc/passwd",
        "http://127.0.0.1/",
        "' union select 'x' --",
        "\0",
        "",
        "x" * 5000,
        None,
        7,
        [],
        {"a": 1},
        True,
    ],
    ids=lambda value: str(value)[:20],
)
def test_key_ids_lead_nowhere(
    api: TestClient, auth: JwksServer, claims: Claims, key_id: Any
) -> None:
    token = with_header(auth.keys[0].sign(claims), kid=key_id)
    assert ask(api, token).status_code == 401
    header = {"alg": "HS256", "kid": key_id}
    assert ask(api, signed_with(b"", header, claims)).status_code == 401


def test_signatures_belong_to_what_was_signed(
    api: TestClient, auth: JwksServer, claims: Claims
) -> None:
    for key in auth.keys:
        header, payload, signature = key.sign(claims).split(".")
        other = encoded(claims | {"sub": str(uuid4())})
        flipped = signature[:5] + ("A" if signature[5] != "A" else "B") + signature[6:]
        for token in (
            f"{header}.{other}.{signature}",
            f"{header}.{payload}.{flipped}",
            f"{header}.{payload}.",
            f"{header}.{payload}",
            f"{header}.{payload}.{encoded(bytes(64))}",
            f"{header}.{payload}.{signature}.{signature}",
        ):
            assert ask(api, token).status_code == 401


@pytest.mark.parametrize(
    "extra",
    [{"crit": ["exp"]}, {"b64": False}, {"b64": False, "crit": ["b64"]}, {"zip": "DEF"}],
    ids=str,
)
def test_extensions_are_not_obeyed(
    api: TestClient, auth: JwksServer, claims: Claims, extra: Claims
) -> None:
    token = with_header(auth.keys[0].sign(claims), **extra)
    assert ask(api, token).status_code == 401


def test_huge_and_deep_tokens(api: TestClient, auth: JwksServer, claims: Claims) -> None:
    huge = auth.keys[0].sign(claims | {"name": "x" * MAX_TOKEN})
    response = ask(api, huge)
    assert response.status_code == 401
    assert str(MAX_TOKEN) in response.json()["detail"]
    for part in (b"[" * 5000, b'{"a":' * 800, b"\xff", b"1e999", b'{"alg":"HS256"', b"9" * 4500):
        for token in (
            f"{encoded(part)}.{encoded(claims)}.x",
            f"{encoded({'alg': 'HS256'})}.{encoded(part)}.x",
        ):
            assert ask(api, token).status_code == 401


@pytest.mark.parametrize(
    "header", ["Bearer", "Bearer ", "Basic {token}", "{token}", "bearer{token}"]
)
def test_what_is_no_bearer_token(
    api: TestClient, auth: JwksServer, claims: Claims, header: str
) -> None:
    value = header.format(token=auth.keys[0].sign(claims))
    response = api.get("/jobs", headers={"Authorization": value})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


def test_tokens_in_the_query_are_not_read(
    api: TestClient, auth: JwksServer, claims: Claims
) -> None:
    token = auth.keys[0].sign(claims)
    assert api.get(f"/jobs?access_token={token}").status_code == 401
    api.cookies.set("access_token", token)
    assert api.get("/jobs").status_code == 401


def test_signed_in_users_act_for_nobody_else(
    api: TestClient, auth: JwksServer, claims: Claims
) -> None:
    headers = {"Authorization": f"Bearer {auth.keys[0].sign(claims)}"}
    for stated, status in ((claims["sub"], 200), (str(uuid4()), 403), ("me", 422)):
        response = api.get("/jobs", headers=headers | {"Pgscribe-User": stated})
        assert response.status_code == status


def test_tokens_are_not_logged(
    api: TestClient, auth: JwksServer, claims: Claims, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    good = auth.keys[0].sign(claims)
    bad = ec_key().sign(claims)
    texts = [ask(api, token).text for token in (good, bad, with_header(good, alg="none"))]
    for part in {*good.split("."), *bad.split(".")}:
        assert part not in caplog.text
        assert not any(part in text for text in texts)


def test_settings_say_where_the_keys_are(settings: Settings) -> None:
    def project(**changes: Any) -> Settings:
        return Settings.load(database_url=settings.database_url, **changes)

    hosted = project(supabase_url="https://ref.supabase.co/")
    assert hosted.signing_keys_url == "https://ref.supabase.co/auth/v1/.well-known/jwks.json"
    assert hosted.token_issuer == "https://ref.supabase.co/auth/v1"
    own = project(
        supabase_url="http://kong:8000",
        jwks_url="http://auth:9999/.well-known/jwks.json",
        jwt_issuer="https://api.example.org/auth/v1",
    )
    assert own.signing_keys_url == "http://auth:9999/.well-known/jwks.json"
    assert own.token_issuer == "https://api.example.org/auth/v1"
    for url in ("ftp://x/y", "file:///etc/passwd", "ref.supabase.co", "https://a:b@c/", "https://"):
        with pytest.raises(SettingsError, match="PGSCRIBE_JWKS_URL"):
            project(jwks_url=url)
    with pytest.raises(SettingsError, match="PGSCRIBE_SUPABASE_URL, PGSCRIBE_JWKS_URL or"):
        create_app(project())
