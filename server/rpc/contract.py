"""The files of the contract, as descriptors. Protobuf has several types for them."""

from typing import Any

from hueshift.v1 import adapters_pb2, finetune_pb2, generation_pb2, model_pb2

FILES: tuple[Any, ...] = (
    generation_pb2.DESCRIPTOR,
    adapters_pb2.DESCRIPTOR,
    finetune_pb2.DESCRIPTOR,
    model_pb2.DESCRIPTOR,
)
SERVICES = tuple(service.full_name for file in FILES for service in file.services_by_name.values())
