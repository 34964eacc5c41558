"""Packing: contents of messages as plain values, and messages in calls of limited size.

Engines that send many messages to one process in a call use these functions. They know
nothing of how the call is made.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

PORTION = 16_000_000
"""Bytes of arrays in one call at most, unless a single message has more."""

OUT_OF_BAND = 16_384
"""Bytes from which the data of an array are not pickled with the message."""


def portions(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Split the messages for a host into calls of at most `PORTION` bytes (usually
    one).

    A call stays in memory until it is answered; the limit bounds this memory. A record
    that several messages of a call share counts once.

    Parameters
    ----------
    messages : Sequence[Message]
        Messages in the order in which they are sent.

    Yields
    ------
    list[Message]
        The messages of one call, at least one.
    """
    portion: list[Message] = []
    counted: set[int] = set()  # ids of the records in the portion
    size = 0
    for message in messages:
        records = message.content.values()
        arrays = [record for record in records if isinstance(record, ArrayRecord)]
        sizes = {id(r): sum(len(a.data) for a in r.values()) for r in arrays}
        added = sum(n for record, n in sizes.items() if record not in counted)
        if portion and added and size + added > PORTION:
            yield portion
            portion, counted, size, added = [], set(), 0, sum(sizes.values())
        portion.append(message)
        counted |= sizes.keys()
        size += added
    if portion:
        yield portion


def pack(contents: Sequence[RecordDict]) -> list[dict[str, Any]]:
    """Convert contents of messages to values that are pickled with few copies.

    A record that several contents share is packed once. Data of at least `OUT_OF_BAND`
    bytes become NumPy arrays, which pickle protocol 5 can transfer without a copy.

    Parameters
    ----------
    contents : Sequence[RecordDict]
        Contents of the messages of one call.

    Returns
    -------
    list[dict[str, Any]]
        For each content its records by name. An ArrayRecord is a list of
        (key, dtype, shape, stype, data); the same list where contents share the record.
    """
    seen: dict[int, list[Any]] = {}
    packed = []
    for content in contents:
        records: dict[str, Any] = {}
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                if id(record) not in seen:
                    seen[id(record)] = _pack_arrays(record)
                records[name] = seen[id(record)]
            else:
                records[name] = record
        packed.append(records)
    return packed


def unpack(packed: Sequence[Mapping[str, Any]]) -> Iterator[RecordDict]:
    """Convert packed contents back; shared records are shared again.

    Parameters
    ----------
    packed : Sequence[Mapping[str, Any]]
        Result of `pack`.

    Yields
    ------
    RecordDict
        One content after another, so that not all are copied at the same time.
    """
    uses = Counter(id(record) for records in packed for record in records.values())
    seen: dict[int, ArrayRecord] = {}
    for records in packed:
        content = RecordDict()
        for name, record in records.items():
            if not isinstance(record, list):
                content[name] = record
            elif uses[id(record)] == 1:
                content[name] = _unpack_arrays(record)
            else:
                if id(record) not in seen:
                    seen[id(record)] = _unpack_arrays(record)
                content[name] = seen[id(record)]
        yield content


def _pack_arrays(record: ArrayRecord) -> list[Any]:
    arrays = []
    for key, array in record.items():
        data: Any = array.data
        if len(data) >= OUT_OF_BAND:
            data = np.frombuffer(data, np.uint8)
        arrays.append((key, array.dtype, array.shape, array.stype, data))
    return arrays


def _unpack_arrays(arrays: list[Any]) -> ArrayRecord:
    record = ArrayRecord()
    for key, dtype, shape, stype, data in arrays:
        whole = data if isinstance(data, bytes) else data.tobytes()
        record[key] = Array(dtype=dtype, shape=shape, stype=stype, data=whole)
    return record
