"""The OpenAPI description of the API, made of its endpoints."""

import inspect
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from jobs import __version__
from web.endpoints import Answer, Endpoint, ErrorForm
from web.problems import Problem
from web.sessions import PLAIN_COOKIE, SECURE_COOKIE

_REF = "#/components/schemas/{model}"
_Models = set[tuple[type[BaseModel], JsonSchemaMode]]

_BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "A token of Supabase Auth, or an API key (`pgscribe keys create`).",
}

_SESSION = (
    "A browser's session of the web app; it counts where there is no `Authorization`. Methods but "
    "GET, HEAD and OPTIONS need `Sec-Fetch-Site: same-origin` or this server's own `Origin`. "
)
_SECURITY_SCHEMES = {
    "bearer": _BEARER,
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": SECURE_COOKIE,
        "description": f"{_SESSION}Under https.",
    },
    "sessionWithoutHttps": {
        "type": "apiKey",
        "in": "cookie",
        "name": PLAIN_COOKIE,
        "description": f"{_SESSION}Under http.",
    },
}


def describe(endpoints: Iterable[Endpoint], tags: Mapping[str, str]) -> dict[str, Any]:
    """Return the description as JSON has it. ``tags``: their texts, in the order to show."""
    from openapi_pydantic import OpenAPI  # a seventh of a web server's start

    models: _Models = {(Problem, "serialization")}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        item = paths.setdefault(endpoint.path.replace(":path", ""), {})
        item[endpoint.method.lower()] = _operation(endpoint, models)
    document = OpenAPI.model_validate(
        {
            "openapi": "3.1.1",
            "info": {
                "title": "pgscribe",
                "version": __version__,
                "description": "Transcription jobs in the Postgres you already have.",
            },
            "tags": [{"name": name, "description": text} for name, text in tags.items()],
            "paths": paths,
            "components": {"schemas": _schemas(models), "securitySchemes": _SECURITY_SCHEMES},
        }
    )
    described: dict[str, Any] = document.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return described


def _operation(endpoint: Endpoint, models: _Models) -> dict[str, Any]:
    summary, _, text = (inspect.getdoc(endpoint.handler) or "").partition("\n")
    operation: dict[str, Any] = {
        "operationId": endpoint.handler.__name__,
        "tags": [endpoint.tag],
        "summary": summary.rstrip("."),
        "description": text.strip(),
        "parameters": [
            *(_path_parameter(endpoint, name) for name in endpoint.path_parameters),
            *_parameters(endpoint.model("query"), "query"),
            *_parameters(endpoint.model("headers"), "header"),
        ],
        "responses": _responses(endpoint, models),
        "security": [{name: []} for name in _SECURITY_SCHEMES] if "user" in endpoint.takes else [],
    }
    if body := _request_body(endpoint, models):
        operation["requestBody"] = body
    return operation


def _path_parameter(endpoint: Endpoint, name: str) -> dict[str, Any]:
    schema = {"type": "string"} | ({"format": "uuid"} if endpoint.takes[name] is UUID else {})
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _parameters(model: type[BaseModel] | None, where: str) -> Iterable[dict[str, Any]]:
    if model is None:
        return
    described = model.model_json_schema()
    for name, schema in described.get("properties", {}).items():
        yield {
            "name": name,
            "in": where,
            "required": name in described.get("required", ()),
            "description": schema.get("description", ""),
            "schema": _inlined(schema, described.get("$defs", {})),
        }


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Return a schema with what it refers to in its place."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items() if key != "title"}


def _request_body(endpoint: Endpoint, models: _Models) -> dict[str, Any] | None:
    bodies = dict(endpoint.raw_body)
    if body := endpoint.model("body"):
        bodies["application/json"] = body
    if not bodies:
        return None
    content = {media: _media(model, "validation", models) for media, model in bodies.items()}
    return {"required": True, "content": content}


def _media(model: type[BaseModel] | None, mode: JsonSchemaMode, models: _Models) -> dict[str, Any]:
    if model is None:
        return {"schema": {}}  # any bytes
    models.add((model, mode))
    return {"schema": {"$ref": _REF.format(model=model.__name__)}}


def _responses(endpoint: Endpoint, models: _Models) -> dict[str, Any]:
    answers = {s: _response(answer, models) for s, answer in endpoint.answers.items()}
    problems = _problems(endpoint, models)
    return {str(s.value): response for s, response in sorted((answers | problems).items())}


def _problems(endpoint: Endpoint, models: _Models) -> dict[HTTPStatus, dict[str, Any]]:
    form = endpoint.error_form or ErrorForm(Problem, "application/problem+json", {})
    content = {form.media_type: _media(form.model, "serialization", models)}
    statuses = {form.statuses.get(status, status) for status in endpoint.problems}
    return {s: {"description": s.phrase, "content": content} for s in statuses}


def _response(answer: Answer, models: _Models) -> dict[str, Any]:
    response: dict[str, Any] = {"description": answer.description}
    if answer.media_types:
        response["content"] = {
            media: _media(answer.model if "json" in media else None, "serialization", models)
            for media in answer.media_types
        }
    if answer.headers:
        response["headers"] = {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in answer.headers.items()
        }
    return response


def _schemas(models: _Models) -> dict[str, Any]:
    _, described = models_json_schema(
        sorted(models, key=lambda pair: (pair[0].__name__, pair[1])), ref_template=_REF
    )
    schemas: dict[str, Any] = described["$defs"]
    return schemas
