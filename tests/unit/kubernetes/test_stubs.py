"""The Python that is checked in speaks what the .proto files say."""

import re
from pathlib import Path
from types import ModuleType

import pytest

import vmplug.kubernetes
from vmplug.kubernetes import (
    device_plugin_grpc,
    device_plugin_pb2,
    pod_resources_grpc,
    pod_resources_pb2,
)

HERE = Path(vmplug.kubernetes.__file__).parent
MESSAGE = re.compile(r"^message (\w+) \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"^  (?:repeated )?[\w<>, ]+ (\w+) = (\d+);$", re.MULTILINE)
CALL = re.compile(r"^  rpc (\w+)\((\w+)\) returns \((?:stream )?(\w+)\)", re.MULTILINE)
SERVICE = re.compile(r"^service (\w+) \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("name", "messages", "services"),
    [
        ("device_plugin", device_plugin_pb2, device_plugin_grpc),
        ("pod_resources", pod_resources_pb2, pod_resources_grpc),
    ],
)
def test_stubs_are_those_of_the_protocol(
    name: str, messages: ModuleType, services: ModuleType
) -> None:
    text = (HERE / f"{name}.proto").read_text()
    described = messages.DESCRIPTOR
    written = {
        message: {field: int(number) for field, number in FIELD.findall(body)}
        for message, body in MESSAGE.findall(text)
    }
    assert written == {
        message.name: {field.name: field.number for field in message.fields}
        for message in described.message_types_by_name.values()
    }
    for service, body in SERVICE.findall(text):
        calls = {
            method.name: (method.input_type.name, method.output_type.name)
            for method in described.services_by_name[service].methods
        }
        assert {call: (asked, answer) for call, asked, answer in CALL.findall(body)} == calls
        for call in calls:
            assert hasattr(getattr(services, f"{service}Base"), call)
