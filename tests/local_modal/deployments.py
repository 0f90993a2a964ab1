"""What `modal deploy` has left here: apps, their functions and classes, and variants of these."""

import shlex
import time
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from tests.local_modal.settings import new_id


@dataclass
class Deployed:
    """A function, or all methods of a class; with parameters or options where they were bound."""

    function_id: str
    app_id: str
    definition: pb.Function
    serialized_params: bytes = b""

    @property
    def name(self) -> str:
        return self.definition.function_name

    @property
    def metadata(self) -> pb.FunctionHandleMetadata:
        function = self.definition
        return pb.FunctionHandleMetadata(
            app_id=self.app_id,
            function_name=function.function_name,
            function_type=function.function_type,
            is_method=function.is_method,
            definition_id=f"de-{self.function_id}",
            class_parameter_info=function.class_parameter_info,
            function_schema=function.function_schema,
            supported_input_formats=function.supported_input_formats,
            supported_output_formats=function.supported_output_formats,
            method_handle_metadata={
                name: _method_metadata(self.app_id, name, method)
                for name, method in function.method_definitions.items()
            },
        )

    @property
    def data(self) -> pb.FunctionData:
        ranked = pb.FunctionData.RankedFunction(rank=0, function=self.definition)
        return pb.FunctionData(ranked_functions=[ranked])


def _method_metadata(
    app_id: str, name: str, method: pb.MethodDefinition
) -> pb.FunctionHandleMetadata:
    return pb.FunctionHandleMetadata(
        app_id=app_id,
        function_name=method.function_name,
        function_type=method.function_type,
        is_method=True,
        use_method_name=name,
        function_schema=method.function_schema,
        supported_input_formats=method.supported_input_formats,
        supported_output_formats=method.supported_output_formats,
    )


@dataclass
class App:
    app_id: str
    name: str
    environment: str
    function_ids: dict[str, str] = field(default_factory=dict)
    class_ids: dict[str, str] = field(default_factory=dict)


class Deployments:
    """The part of the control plane that looks up and deploys."""

    def __init__(self) -> None:
        self.build_failure: str | None = None  # what the next images fail with
        self._apps: dict[tuple[str, str], App] = {}  # by environment and name
        self._functions: dict[str, Deployed] = {}
        self._variants: dict[tuple[str, bytes, bytes], str] = {}
        self._volumes: dict[str, pb.VolumeMetadata] = {}
        self._images: dict[str, list[str]] = {}

    def find(self, function_id: str) -> Deployed:
        if function_id not in self._functions:
            raise GRPCError(Status.NOT_FOUND, f"Function {function_id} not found")
        return self._functions[function_id]

    def named(self, name: str) -> list[Deployed]:
        """Return the function of this name and all its variants."""
        return [each for each in self._functions.values() if each.name == name]

    def definitions(self) -> dict[str, dict[str, Any]]:
        """Return what was deployed, as "app/function" or "environment:app/function", and images."""
        return {
            f"{app.environment and f'{app.environment}:'}{app.name}/{tag}": self._definition(
                self.find(function_id)
            )
            for app in self._apps.values()
            for tag, function_id in app.function_ids.items()
        }

    def _definition(self, function: Deployed) -> dict[str, Any]:
        fields: dict[str, Any] = MessageToDict(
            function.definition, preserving_proto_field_name=True
        )
        return fields | {"image": self._images.get(function.definition.image_id, [])}

    def image_environment(self, function: Deployed) -> dict[str, str]:
        """Return what the image's ENV lines set."""
        lines = self._images.get(function.definition.image_id, [])
        words = [
            shlex.split(line.removeprefix("ENV ")) for line in lines if line.startswith("ENV ")
        ]
        return dict(word.split("=", 1) for line in words for word in line if "=" in word)

    def layout(self, app_id: str) -> pb.AppLayout:
        """Return what a container learns of its app."""
        app = self._app(app_id)
        objects = [
            pb.Object(object_id=id_, function_handle_metadata=self.find(id_).metadata)
            for id_ in app.function_ids.values()
        ]
        objects += [
            pb.Object(object_id=id_, class_handle_metadata=pb.ClassHandleMetadata())
            for id_ in app.class_ids.values()
        ]
        objects += [
            pb.Object(object_id=id_, volume_metadata=volume)
            for id_, volume in self._volumes.items()
        ]
        ids = self._dependencies(app) - {each.object_id for each in objects}
        objects += [pb.Object(object_id=id_) for id_ in ids]
        return pb.AppLayout(objects=objects, function_ids=app.function_ids, class_ids=app.class_ids)

    def _dependencies(self, app: App) -> set[str]:
        functions = map(self.find, app.function_ids.values())
        return {
            dependency.object_id
            for function in functions
            for dependency in function.definition.object_dependencies
        }

    def _named(self, environment: str, name: str) -> App | None:
        return self._apps.get((_environment(environment), name))

    def _app(self, app_id: str) -> App:
        for app in self._apps.values():
            if app.app_id == app_id:
                return app
        raise GRPCError(Status.NOT_FOUND, f"App {app_id} not found")

    # Looking up.

    async def function_get(self, request: pb.FunctionGetRequest) -> Message:
        app = self._named(request.environment_name, request.app_name)
        if app is None or request.object_tag not in app.function_ids:
            raise self._not_found(app, request.app_name, request.object_tag)
        function = self.find(app.function_ids[request.object_tag])
        return pb.FunctionGetResponse(
            function_id=function.function_id,
            handle_metadata=function.metadata,
            function=function.data,
        )

    @staticmethod
    def _not_found(app: App | None, app_name: str, tag: str) -> GRPCError:
        if app is None:
            return GRPCError(Status.NOT_FOUND, f"App '{app_name}' not found")
        if tag in app.class_ids:
            reason = pb.FunctionLookupError(reason=pb.FunctionLookupError.REASON_CLASS_NAME_USED)
            return GRPCError(Status.NOT_FOUND, f"'{tag}' is a class", [reason])
        return GRPCError(Status.NOT_FOUND, f"App '{app_name}' has no function '{tag}'")

    async def class_get(self, request: pb.ClassGetRequest) -> Message:
        app = self._named(request.environment_name, request.app_name)
        if app is None:
            raise GRPCError(Status.NOT_FOUND, f"App '{request.app_name}' not found")
        if request.object_tag not in app.class_ids:
            raise GRPCError(
                Status.NOT_FOUND, f"App '{request.app_name}' has no class '{request.object_tag}'"
            )
        return pb.ClassGetResponse(
            class_id=app.class_ids[request.object_tag], handle_metadata=pb.ClassHandleMetadata()
        )

    async def function_bind_params(self, request: pb.FunctionBindParamsRequest) -> Message:
        """Return the variant; the same one for the same parameters, and so the same containers."""
        options = request.function_options.SerializeToString(deterministic=True)
        key = (request.function_id, request.serialized_params, options)
        if key not in self._variants:
            self._variants[key] = self._add_variant(request)
        function = self.find(self._variants[key])
        return pb.FunctionBindParamsResponse(
            bound_function_id=function.function_id, handle_metadata=function.metadata
        )

    def _add_variant(self, request: pb.FunctionBindParamsRequest) -> str:
        base = self.find(request.function_id)
        definition = pb.Function()
        definition.CopyFrom(base.definition)
        _apply(request.function_options, definition)
        function_id = new_id("fu")
        self._functions[function_id] = Deployed(
            function_id, base.app_id, definition, request.serialized_params
        )
        return function_id

    # Deploying.

    async def app_get_by_deployment_name(
        self, request: pb.AppGetByDeploymentNameRequest
    ) -> Message:
        app = self._named(request.environment_name, request.name)
        return pb.AppGetByDeploymentNameResponse(app_id=app.app_id if app else "")

    async def app_create(self, request: pb.AppCreateRequest) -> Message:
        app = App(new_id("ap"), request.description, _environment(request.environment_name))
        self._apps["", app.app_id] = app  # under its name once it is published
        return pb.AppCreateResponse(app_id=app.app_id, app_page_url=f"local/{app.app_id}")

    async def app_get_layout(self, request: pb.AppGetLayoutRequest) -> Message:
        return pb.AppGetLayoutResponse(app_layout=self.layout(request.app_id))

    async def app_publish(self, request: pb.AppPublishRequest) -> Message:
        app = self._app(request.app_id)
        app.name = request.name
        app.function_ids = dict(request.function_ids)
        app.class_ids = dict(request.class_ids)
        self._apps.pop(("", app.app_id), None)
        self._apps[app.environment, app.name] = app
        return pb.AppPublishResponse(url=f"local/{app.app_id}", deployed_at=time.time())

    async def function_precreate(self, request: pb.FunctionPrecreateRequest) -> Message:
        function = Deployed(
            request.existing_function_id or new_id("fu"),
            request.app_id,
            pb.Function(
                function_name=request.function_name,
                function_type=request.function_type,
                method_definitions=request.method_definitions,
                function_schema=request.function_schema,
                supported_input_formats=request.supported_input_formats,
                supported_output_formats=request.supported_output_formats,
            ),
        )
        self._functions.setdefault(function.function_id, function)
        return pb.FunctionPrecreateResponse(
            function_id=function.function_id, handle_metadata=function.metadata
        )

    async def function_create(self, request: pb.FunctionCreateRequest) -> Message:
        ranked = request.function_data.ranked_functions
        definition = ranked[0].function if ranked else request.function
        function_id = request.existing_function_id or new_id("fu")
        function = Deployed(function_id, request.app_id, definition)
        self._functions[function_id] = function
        return pb.FunctionCreateResponse(
            function_id=function_id,
            handle_metadata=function.metadata,
            function=definition,
            function_data=function.data,
        )

    async def class_create(self, request: pb.ClassCreateRequest) -> Message:
        return pb.ClassCreateResponse(
            class_id=request.existing_class_id or new_id("cs"),
            handle_metadata=pb.ClassHandleMetadata(),
        )

    async def environment_get_or_create(self, request: pb.EnvironmentGetOrCreateRequest) -> Message:
        settings = pb.EnvironmentSettings(image_builder_version="2025.06")
        return pb.EnvironmentGetOrCreateResponse(
            environment_id="en-local",
            metadata=pb.EnvironmentMetadata(
                name=request.deployment_name or "main", settings=settings
            ),
        )

    async def image_get_or_create(self, request: pb.ImageGetOrCreateRequest) -> Message:
        """Build nothing: containers run in this machine's own environment."""
        image_id = new_id("im")
        bases = [line for base in request.image.base_images for line in self._images[base.image_id]]
        self._images[image_id] = bases + list(request.image.dockerfile_commands)
        built = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_SUCCESS)
        if self.build_failure is not None:
            failure = pb.GenericResult.GENERIC_STATUS_FAILURE
            built = pb.GenericResult(status=failure, exception=self.build_failure)
        metadata = pb.ImageMetadata(image_builder_version="2025.06")
        return pb.ImageGetOrCreateResponse(image_id=image_id, result=built, metadata=metadata)

    async def mount_get_or_create(self, _request: pb.MountGetOrCreateRequest) -> Message:
        return pb.MountGetOrCreateResponse(
            mount_id=new_id("mo"), handle_metadata=pb.MountHandleMetadata()
        )

    async def mount_put_file(self, _request: pb.MountPutFileRequest) -> Message:
        """Say that the file is here already: it is, on the same disk."""
        return pb.MountPutFileResponse(exists=True)

    async def mount_batched_check_existence(
        self, _request: pb.MountBatchedCheckExistenceRequest
    ) -> Message:
        return pb.MountBatchedCheckExistenceResponse()

    async def volume_get_or_create(self, request: pb.VolumeGetOrCreateRequest) -> Message:
        """Give an id. Nothing is mounted: see the README."""
        metadata = pb.VolumeMetadata(name=request.deployment_name, version=request.version)
        volume_id = f"vo-{request.deployment_name or new_id('x')}"
        self._volumes[volume_id] = metadata
        return pb.VolumeGetOrCreateResponse(
            volume_id=volume_id, version=request.version, metadata=metadata
        )

    async def volume_commit(self, _request: pb.VolumeCommitRequest) -> Message:
        return pb.VolumeCommitResponse()

    async def secret_get_or_create(self, request: pb.SecretGetOrCreateRequest) -> Message:
        return pb.SecretGetOrCreateResponse(secret_id=f"st-{request.deployment_name or 'local'}")


def _environment(name: str) -> str:
    """Return "" for the default environment, which has two names."""
    return "" if name == "main" else name


def _apply(options: pb.FunctionOptions, definition: pb.Function) -> None:
    if options.HasField("timeout_secs"):
        definition.timeout_secs = options.timeout_secs
    if options.HasField("concurrency_limit"):
        definition.autoscaler_settings.max_containers = options.concurrency_limit
    if options.HasField("task_idle_timeout_secs"):
        definition.autoscaler_settings.scaledown_window = options.task_idle_timeout_secs
    if options.HasField("retry_policy"):
        definition.retry_policy.CopyFrom(options.retry_policy)
