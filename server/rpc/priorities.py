"""Priorities of the contract as numbers, larger first, of requests and of jobs."""

from collections.abc import Mapping

from hueshift.v1 import generation_pb2 as pb

PRIORITIES: Mapping["pb.Priority.ValueType", int] = {
    pb.PRIORITY_UNSPECIFIED: 0,
    pb.PRIORITY_LOW: -1,
    pb.PRIORITY_NORMAL: 0,
    pb.PRIORITY_HIGH: 1,
}


def tell_priority(number: int) -> "pb.Priority.ValueType":
    """Return the contract's word for a number; of one that an operator wrote into the table, what comes nearest."""
    if number == 0:
        return pb.PRIORITY_NORMAL
    return pb.PRIORITY_HIGH if number > 0 else pb.PRIORITY_LOW
