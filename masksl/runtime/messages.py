"""Records of Flower messages and of client state.

Records of a message are named after the kinds of the ledger (``activation``,
``gradient``, ``model``, ...). Each is an ArrayRecord. Beside them, ``place`` holds the
round and the step, ``metrics`` measurements, ``failure`` the reason why a run must end.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from masksl import compress
from masksl.codec import wire
from masksl.compress import FrameError, NotFiniteError
from masksl.runtime.ledger import Entry

HELLO = "query.hello"
SAVE = "query.save"

MODEL = "model"
PLACE = "place"
METRICS = "metrics"
FAILURE = "failure"
SETTINGS = "settings"
STATE = "state."  # prefix of records that restore a client's own state

FRAME = "masksl.frame"
_TENSOR = "masksl.tensor"
_EXACT = compress.make("none")


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


def metrics_of(content: RecordDict) -> dict[str, Any]:
    """Return the measurements of a message, {} if it has none."""
    return dict(content.metric_records.get(METRICS, {}))


def place_of(content: RecordDict) -> dict[str, Any]:
    """Return round, step and what else the server sets of a message."""
    return dict(content.config_records[PLACE])


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
        for kind, record in content.array_records.items()
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
    return Entry(kind, sent, sent)


# --- frames ---------------------------------------------------------------------------


def frame_record(frame: bytes) -> ArrayRecord:
    """Return a record with one frame, which is not copied."""
    record = ArrayRecord()
    record["frame"] = _frame_array(frame)
    return record


def frame_of(content: RecordDict, kind: str) -> bytes:
    """Return the one frame of a kind; `FrameError` if there is none."""
    try:
        return _frame_bytes(content.array_records[kind]["frame"])
    except KeyError:
        raise FrameError(f"message without {kind}") from None


def _frame_array(frame: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(frame),), stype=FRAME, data=frame)


def _frame_bytes(array: Array) -> bytes:
    if array.stype != FRAME:
        raise FrameError(f"array of type {array.stype!r}, expected {FRAME!r}")
    return array.data


# --- models ---------------------------------------------------------------------------


def model_record(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Encode tensors by name as exact frames, integers as float64."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        exact = tensor if tensor.is_floating_point() else tensor.double()
        record[name] = _frame_array(_EXACT.encode(exact))
    return record


def model_of(
    content: RecordDict, like: Mapping[str, torch.Tensor], kind: str = MODEL
) -> dict[str, torch.Tensor] | None:
    """Decode the tensors of a message, None if it has none.

    Parameters
    ----------
    content : RecordDict
        Content of the message.
    like : Mapping[str, torch.Tensor]
        Tensors by name with the expected shapes. The decoded tensors have their dtypes
        and device.
    kind : str
        Name of the record.

    Raises
    ------
    FrameError
        If names or shapes differ, or a frame is broken.
    """
    record = content.array_records.get(kind)
    if record is None:
        return None
    if set(record) != set(like):
        raise FrameError(f"{kind} of {len(record)} tensors, expected {len(like)}")
    tensors = {}
    for name, expected in like.items():
        tensor = compress.decode(_frame_bytes(record[name]), device=expected.device)
        if tensor.shape != expected.shape:
            raise FrameError(
                f"tensor {name} of shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected.shape)}"
            )
        tensors[name] = tensor.to(expected.dtype)
    return tensors


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
