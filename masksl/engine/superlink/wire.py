"""What both sides of a stream agree on: the call, and its messages.

A message is its number (8 bytes) and the length of its head (4 bytes), both little-
endian, the head as JSON, and the data of all arrays in the order of the head. An array
has its length in the head; the lengths must fill the message exactly.
"""

import base64
import binascii
import json
import struct
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

SERVE = "train.serve"
"""Type of the message that invites a node."""

INVITATION = "invitation"
"""Its record: address, certificate, token, longest message, time to reconnect."""

SERVICE = "masksl.Streams"
METHOD = "Serve"
NODE_KEY = "masksl-node"
TOKEN_KEY = "masksl-token"

KEEPALIVE_TIME = 10.0  # seconds without a sign of life before one is asked for
KEEPALIVE_TIMEOUT = 10.0  # seconds for it to come

KEEPALIVE = (
    ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT * 1000)),
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT * 1000)),  # by default 60 s
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
)
"""Options of both sides."""

_PREFIX = struct.Struct("<QI")
MAX_HEAD = 16 * 2**20
"""Bytes of a head at most."""

BYE = 0
"""Number of the message that ends a stream; requests are numbered from 1 on."""

_RECORDS = "records"
_BYTES = "base64"  # key of a value of bytes in the settings of a head
_PLAIN = {"config": ConfigRecord, "metrics": MetricRecord}


LONGEST_TEXT = 300
"""Characters of the text of a `WireError` at most."""


class WireError(ValueError):
    """Raised for a message that is broken; the text is one short line."""

    def __init__(self, text: str) -> None:
        super().__init__(text[:LONGEST_TEXT])


def number_of(data: bytes) -> int:
    """Return the number of a message; `WireError` if it has none."""
    if len(data) < _PREFIX.size:
        raise WireError(f"message of {len(data)} bytes: at least {_PREFIX.size}")
    return int(_PREFIX.unpack_from(data)[0])


def encode(
    number: int, head: Mapping[str, Any], content: RecordDict | None = None
) -> bytes:
    """Encode a message.

    Parameters
    ----------
    number : int
        Its number, below 2^64.
    head : Mapping[str, Any]
        What JSON can express.
    content : RecordDict | None
        Its records.

    Returns
    -------
    bytes
        The message, in which the arrays are copied once.

    Raises
    ------
    WireError
        If the head has more than `MAX_HEAD` bytes.
    """
    parts: list[bytes] = []
    records = [] if content is None else [_record(*r, parts) for r in content.items()]
    text = json.dumps({**head, _RECORDS: records}, separators=(",", ":")).encode()
    if len(text) > MAX_HEAD:
        raise WireError(f"head of {len(text)} bytes: at most {MAX_HEAD}")
    return b"".join((_PREFIX.pack(number, len(text)), text, *parts))


def decode(data: bytes) -> tuple[dict[str, Any], RecordDict]:
    """Decode a message into its head and its records.

    Raises
    ------
    WireError
        If the message is broken.
    """
    number_of(data)
    _, length = _PREFIX.unpack_from(data)
    start = _PREFIX.size + length
    if length > MAX_HEAD or start > len(data):
        raise WireError(f"head of {length} bytes in a message of {len(data)}")
    try:
        head = json.loads(data[_PREFIX.size : start])
        records = head.pop(_RECORDS)
        _check_outcome(head)
        content = RecordDict()
        reader = _Reader(memoryview(data), start)
        for kind, name, values in records:
            content[name] = _decode_record(kind, values, reader)
    except WireError:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise WireError(f"head that is broken: {error!r}") from error
    if reader.position != len(data):
        raise WireError(f"{len(data) - reader.position} bytes that are no array's")
    return head, content


def _check_outcome(head: Mapping[str, Any]) -> None:
    """Check what the head of a reply says instead of its records, if it does."""
    code, reason = head.get("error", (0, ""))
    length = head.get("too_long", 0)
    if not (_is_whole(code) and isinstance(reason, str) and _is_whole(length)):
        raise WireError("error or length that is broken")


class _Reader:
    """Returns the data of one array after another."""

    def __init__(self, data: memoryview, position: int) -> None:
        self._data = data
        self.position = position

    def take(self, length: int) -> bytes:
        """Return the data of the next array."""
        if not 0 <= length <= len(self._data) - self.position:
            raise WireError(f"array of {length} bytes beyond the end of the message")
        start, self.position = self.position, self.position + length
        return bytes(self._data[start : self.position])


def _record(name: str, record: Any, parts: list[bytes]) -> list[Any]:
    """Return a record as JSON has it; append the data of its arrays."""
    if isinstance(record, ArrayRecord):
        arrays = []
        for key, array in record.items():
            data = array.data
            parts.append(data)
            arrays.append([key, array.dtype, array.shape, array.stype, len(data)])
        return ["arrays", name, arrays]
    kind = "config" if isinstance(record, ConfigRecord) else "metrics"
    return [kind, name, {key: _plain(value) for key, value in record.items()}]


def _decode_record(kind: str, values: Any, reader: _Reader) -> Any:
    if kind in _PLAIN:
        return _PLAIN[kind]({key: _value(value) for key, value in values.items()})
    if kind != "arrays":
        raise WireError(f"record of kind {kind!r}")
    record = ArrayRecord()
    for key, dtype, shape, stype, length in values:
        if not (_is_whole(length) and all(_is_whole(n) for n in shape)):
            raise WireError(f"array {key!r} of length {length!r}, shape {shape!r}")
        record[key] = Array(
            dtype=str(dtype),
            shape=tuple(shape),
            stype=str(stype),
            data=reader.take(length),
        )
    return record


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Return a value of a record as JSON has it."""
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    return value


def _value(value: Any) -> Any:
    """Return a value of a record from JSON."""
    if isinstance(value, dict):
        try:
            return base64.b64decode(value[_BYTES], validate=True)
        except (KeyError, binascii.Error) as error:
            raise WireError(f"value that is broken: {error!r}") from error
    if isinstance(value, list):
        return [_value(element) for element in value]
    return value
