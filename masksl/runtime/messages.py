"""Records of Flower messages and of client state.

Records of a message are named after the kinds of the ledger (``activation``,
``gradient``, ``model``, ...). Each is an ArrayRecord. Beside them, ``place`` holds the
round and the step, ``metrics`` measurements, ``failure`` the reason why a run must end.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from masksl import compress
from masksl.codec import planes, wire
from masksl.compress import FrameError, NotFiniteError
from masksl.runtime.ledger import Entry

HELLO = "query.hello"
SAVE = "query.save"

MODEL = "model"
DIGEST = "digest"
PLACE = "place"
METRICS = "metrics"
FAILURE = "failure"
SETTINGS = "settings"
WORKER = "worker"  # measurement of every reply: its process
STATE = "state."  # prefix of records that restore a client's own state

FRAME = "masksl.frame"
FRAMES = "masksl.frames"
_RAW = "masksl.raw"
_TENSOR = "masksl.tensor"
_DIGEST = struct.Struct("<Q")
_ONLY = "frame"  # key of the one array of a record


class RunError(RuntimeError):
    """An error that ends a run; its text is one line for the user."""


@contextmanager
def ends_run(where: str) -> Iterator[None]:
    """Turn a broken frame or a value that is not finite into a `RunError`.

    Parameters
    ----------
    where : str
        Round, step, client and compressor; the error line begins with it.
    """
    try:
        yield
    except (FrameError, NotFiniteError) as error:
        raise RunError(f"{where}: {error}") from error


def failure(reason: object) -> RecordDict:
    """Return the content of a reply that ends the run with a reason."""
    return RecordDict({FAILURE: ConfigRecord({"reason": str(reason)})})


# The properties `array_records` and the like of Flower's RecordDict (1.41) copy all
# records at each use; these look at one.


def arrays_of(content: RecordDict, kind: str) -> ArrayRecord | None:
    """Return the record of arrays of a name, None if there is none."""
    record = content.get(kind)
    return record if isinstance(record, ArrayRecord) else None


def config_of(content: RecordDict, name: str) -> ConfigRecord | None:
    """Return the record of settings of a name, None if there is none."""
    record = content.get(name)
    return record if isinstance(record, ConfigRecord) else None


def metrics_of(content: RecordDict) -> dict[str, Any]:
    """Return the measurements of a message, {} if it has none."""
    record = content.get(METRICS)
    return dict(record) if isinstance(record, MetricRecord) else {}


def metric_of(content: RecordDict, name: str) -> float:
    """Return a measurement of a message; `FrameError` unless it is a finite number."""
    record = content.get(METRICS)
    value = record.get(name) if isinstance(record, MetricRecord) else None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise FrameError(f"{METRICS} with {name}={value}, expected a finite number")
    return value


def place_of(content: RecordDict) -> dict[str, Any]:
    """Return round, step and what else the server sets of a message."""
    place = config_of(content, PLACE)
    if place is None:
        raise KeyError(f"message without {PLACE}")
    return dict(place)


def add_to_place(content: RecordDict, more: Mapping[str, float]) -> None:
    """Add to the place of a message."""
    place = config_of(content, PLACE)
    if place is None:
        raise KeyError(f"message without {PLACE}")
    for key, value in more.items():
        place[key] = value


def entries(content: RecordDict, full: Mapping[str, int] | None = None) -> list[Entry]:
    """Return what the ledger counts of a message: each array, by its record's name.

    Parameters
    ----------
    content : RecordDict
        Content of the message.
    full : Mapping[str, int] | None
        By record name, the elements of a tensor of which only a part is sent.
    """
    counted = [
        _entry(kind, array)
        for kind, record in content.items()
        if isinstance(record, ArrayRecord)
        for array in record.values()
    ]
    if not full:
        return counted
    return [
        entry._replace(dense=4 * full[entry.kind]) if entry.kind in full else entry
        for entry in counted
    ]


def _entry(kind: str, array: Array) -> Entry:
    sent = len(array.data)
    if array.stype == FRAME:
        return Entry(kind, sent, 4 * wire.declared_elements(array.data))
    if array.stype == FRAMES:
        if len(array.shape) != 1:
            raise FrameError(f"{kind} of shape {tuple(array.shape)}, expected one size")
        return Entry(kind, sent, array.shape[0])
    return Entry(kind, sent, sent)


# --- frames ---------------------------------------------------------------------------


def frame_record(frame: bytes) -> ArrayRecord:
    """Return a record with one frame, which is not copied."""
    return _record_of(frame, FRAME, len(frame))


def frame_of(content: RecordDict, kind: str) -> bytes:
    """Return the one frame of a kind; `FrameError` if there is none."""
    return _bytes_of(content, kind, FRAME)


def set_record(data: bytes, dense: int) -> ArrayRecord:
    """Return a record with one frame-set, which is not copied.

    Parameters
    ----------
    data : bytes
        The frame-set, `masksl.compress.encode_set`.
    dense : int
        What the ledger compares it with, `dense_bytes` of its tensors. Flower's
        description of the array has it as the array's shape: it reaches the other side
        without being one of the bytes that are counted.
    """
    return _record_of(data, FRAMES, dense)


def set_of(content: RecordDict, kind: str = MODEL) -> bytes:
    """Return the one frame-set of a kind; `FrameError` if there is none."""
    return _bytes_of(content, kind, FRAMES)


def raw_record(data: bytes) -> ArrayRecord:
    """Return a record of a few bytes that are no frame, such as flags or a number."""
    return _record_of(data, _RAW, len(data))


def raw_of(content: RecordDict, kind: str, size: int | None = None) -> bytes:
    """Return the bytes of a kind; `FrameError` unless there are as many, if given."""
    data = _bytes_of(content, kind, _RAW)
    if size is not None and len(data) != size:
        raise FrameError(f"{kind} of {len(data)} bytes, expected {size}")
    return data


def digest_record(digest: int) -> ArrayRecord:
    """Return a record of a digest, by which copies are compared: 8 bytes."""
    return raw_record(_DIGEST.pack(digest))


def digest_of(content: RecordDict) -> int:
    """Return the digest of a message."""
    (digest,) = _DIGEST.unpack(raw_of(content, DIGEST, _DIGEST.size))
    return int(digest)


def dense_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of tensors without compression.

    Floating ones in float32, four bytes an element; all others as they are.
    """
    return sum(
        4 * tensor.numel() if tensor.is_floating_point() else tensor.nbytes
        for tensor in tensors.values()
    )


def _record_of(data: bytes, stype: str, size: int) -> ArrayRecord:
    record = ArrayRecord()
    record[_ONLY] = Array(dtype="uint8", shape=(size,), stype=stype, data=data)
    return record


def _bytes_of(content: RecordDict, kind: str, stype: str) -> bytes:
    record = arrays_of(content, kind)
    if record is None or _ONLY not in record:
        raise FrameError(f"message without {kind}")
    array = record[_ONLY]
    if array.stype != stype:
        raise FrameError(f"{kind} of type {array.stype!r}, expected {stype!r}")
    return array.data


# --- models ---------------------------------------------------------------------------


def model_record(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Encode tensors by name as one frame-set of exact values.

    The receiver needs tensors of the same order, see `model_of`. `NotFiniteError` names
    the first tensor that has values that are not finite: a model that diverged.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            planes.finite_bounds(wire.flatten(tensor), f"tensor {name}")
    return set_record(compress.encode_set(tensors), dense_bytes(tensors))


def model_of(
    content: RecordDict, like: Mapping[str, torch.Tensor], kind: str = MODEL
) -> dict[str, torch.Tensor] | None:
    """Decode the exact tensors of a message, None if it has none.

    Parameters
    ----------
    content : RecordDict
        Content of the message.
    like : Mapping[str, torch.Tensor]
        Tensors by name with the expected dtypes and shapes, in the order in which they
        were encoded. The decoded tensors have their names and devices.
    kind : str
        Name of the record.

    Raises
    ------
    FrameError
        If the tensors are of other dtypes or shapes, or the frame-set is broken.
    """
    if arrays_of(content, kind) is None:
        return None
    return compress.decode_set(set_of(content, kind), like)


# --- state ----------------------------------------------------------------------------


class LiveArray(Array):
    """An Array that holds a tensor and is serialised only when it is pickled.

    Engines that keep a client's state in memory serialise nothing. Engines that pickle
    the state, or send it, get an ordinary Array. The constructor of Array (Flower 1.41)
    is not called, because it would serialise the tensor.

    Parameters
    ----------
    tensor : torch.Tensor
        Held, not copied.
    """

    def __init__(self, tensor: torch.Tensor) -> None:  # pylint: disable=W0231
        self.__dict__["tensor"] = tensor
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.shape = tuple(tensor.shape)
        self.stype = _TENSOR

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The tensor's bytes, row-major, little-endian."""
        flat = wire.flatten(self.__dict__["tensor"])
        return flat.view(torch.uint8).cpu().numpy().tobytes()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as an ordinary Array."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


def state_record(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Return tensors by name as live arrays, of any dtype."""
    record = ArrayRecord()
    for name, tensor in tensors.items():  # the constructor would serialise them
        record[name] = LiveArray(tensor)
    return record


def state_tensors(
    record: Mapping[str, Array], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the tensors of a state record on a device; live ones are not copied
    there."""
    tensors = {}
    for name, array in record.items():
        if isinstance(array, LiveArray):
            tensors[name] = array.__dict__["tensor"].to(device)
        else:
            dtype = getattr(torch, array.dtype)
            data = bytearray(array.data)
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0)
            tensors[name] = flat.to(dtype).view(array.shape).to(device)
    return tensors
