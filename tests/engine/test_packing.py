"""Packing of message contents and splitting of messages into calls."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from masksl.engine import packing
from masksl.engine.nodes import set_task_identity
from masksl.engine.packing import OUT_OF_BAND, PORTION, pack, portions, unpack

MEGABYTE = 1_000_000


def record(**sizes: int) -> ArrayRecord:
    """Return a record of one array of bytes for each name and size."""
    arrays = ArrayRecord()
    for name, size in sizes.items():
        arrays[name] = Array(dtype="uint8", shape=(size,), stype="t", data=bytes(size))
    return arrays


def messages(shared: ArrayRecord, sizes: list[int]) -> list[Message]:
    """Return messages with a shared record and one of their own."""
    set_task_identity(1)  # Flower needs it to make messages
    return [
        Message(RecordDict({"shared": shared, "own": record(a=size)}), 1, "query.a")
        for size in sizes
    ]


@pytest.mark.parametrize(
    ("shared", "sizes", "lengths"),
    [
        (4_000, [4 * MEGABYTE] * 10, [3, 3, 3, 1]),
        (4_000, [4 * MEGABYTE] * 3, [3]),
        (10 * MEGABYTE, [4 * MEGABYTE] * 3, [1, 1, 1]),
        (10 * MEGABYTE, [1000] * 70, [70]),  # the shared record counts once
        (PORTION + 1, [0] * 3, [3]),
        (0, [PORTION + 1, 1, 1], [1, 2]),
        (0, [], []),
    ],
)
def test_calls_have_a_limited_size(
    shared: int, sizes: list[int], lengths: list[int]
) -> None:
    assert PORTION == 16 * MEGABYTE
    sent = messages(record(a=shared), sizes)
    calls = list(portions(sent))
    assert [message for call in calls for message in call] == sent
    assert [len(call) for call in calls] == lengths


def test_the_limit_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PORTION", 1)
    sent = messages(record(a=10), [10, 10])
    assert [len(call) for call in portions(sent)] == [1, 1]


def test_shared_records_are_packed_once() -> None:
    big = record(w=OUT_OF_BAND, n=OUT_OF_BAND - 1)
    small = record(frame=5)
    place = ConfigRecord({"round": 1, "lr": 0.1})
    contents = [
        RecordDict({"model": big, "place": place}),
        RecordDict({"model": big, "gradient": small}),
    ]
    packed = pack(contents)
    assert packed[0]["model"] is packed[1]["model"]
    types = [type(fields[-1]) for fields in packed[0]["model"]]
    assert types == [np.ndarray, bytes]
    first, second = unpack(packed)
    assert first["model"] is second["model"]
    assert first["model"] == big and second["gradient"] == small
    assert first["place"] == place
    arrays = first.array_records["model"].values()
    assert all(isinstance(array.data, bytes) for array in arrays)
