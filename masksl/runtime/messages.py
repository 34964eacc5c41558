"""What lies in a Flower message and in a client's state, and how.

The records of a message are named by what the ledger calls them: ``activation``,
``label``, ``gradient`` and ``model``, each an ArrayRecord; ``place`` tells round and
step, ``figures`` holds measurements, ``failure`` the reason why a run must end.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from masksl import compress
from masksl.codec import wire
from masksl.compress import FrameError
from masksl.runtime.ledger import Entry

HELLO = "query.hello"
SAVE = "query.save"
FORWARD = "train.forward"
BACKWARD = "train.backward"
EVALUATE = "evaluate.forward"

ACTIVATION = "activation"
LABEL = "label"
GRADIENT = "gradient"
MODEL = "model"
MOMENTUM = "momentum"
PLACE = "place"
FIGURES = "figures"
FAILURE = "failure"
SETTINGS = "settings"

_FRAME = "masksl.frame"
_LABELS = "masksl.labels"
_TENSOR = "masksl.tensor"
_EXACT = compress.make("none")


class RunError(RuntimeError):
    """What ends a run; its text is one line for the user."""


def failure(reason: object) -> RecordDict:
    """Return a reply that ends the run with a reason."""
    return RecordDict({FAILURE: ConfigRecord({"reason": str(reason)})})


def entries(content: RecordDict, gradient: int | None = None) -> list[Entry]:
    """Return what of a message the ledger counts: every array, by its record's name.

    ``gradient`` is the number of elements of a gradient of which only a part is sent.
    """
    counted = [
        _entry(kind, array)
        for kind, record in content.array_records.items()
        for array in record.values()
    ]
    if gradient is None:
        return counted
    return [
        entry._replace(dense=4 * gradient) if entry.kind == GRADIENT else entry
        for entry in counted
    ]


def _entry(kind: str, array: Array) -> Entry:
    sent = len(array.data)
    if array.stype == _FRAME:
        return Entry(kind, sent, 4 * wire.declared_elements(array.data))
    return Entry(kind, sent, sent)


# --- frames ---------------------------------------------------------------------------


def frame_record(frame: bytes) -> ArrayRecord:
    """Return a record with one frame, which is not copied."""
    record = ArrayRecord()
    record["frame"] = _frame_array(frame)
    return record


def frame_of(content: RecordDict, kind: str) -> bytes:
    """Return the one frame of a kind; `FrameError` where there is none."""
    try:
        return _frame_bytes(content.array_records[kind]["frame"])
    except KeyError:
        raise FrameError(f"message without {kind}") from None


def _frame_array(frame: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(frame),), stype=_FRAME, data=frame)


def _frame_bytes(array: Array) -> bytes:
    if array.stype != _FRAME:
        raise FrameError(f"array of type {array.stype!r}, expected {_FRAME!r}")
    return array.data


# --- labels ---------------------------------------------------------------------------


def label_record(labels: torch.Tensor, classes: int) -> ArrayRecord:
    """Return a record of labels: uint8 up to 256 classes, else uint16."""
    packed = labels.cpu().numpy().astype("<u1" if classes <= 256 else "<u2")
    record = ArrayRecord()
    record[LABEL] = Array(
        dtype=str(packed.dtype),
        shape=packed.shape,
        stype=_LABELS,
        data=packed.tobytes(),
    )
    return record


def labels_of(content: RecordDict, classes: int, expected: int) -> torch.Tensor:
    """Return the labels of a message.

    Parameters
    ----------
    content : RecordDict
        Content of the message.
    classes : int
        Number of classes.
    expected : int
        Number of labels that there must be.

    Returns
    -------
    torch.Tensor
        int64, shape (expected,), on the CPU.

    Raises
    ------
    FrameError
        If they are missing, too many, too few, or of classes that there are not.
    """
    dtype = np.dtype("<u1" if classes <= 256 else "<u2")
    record = content.array_records.get(LABEL)
    array = record[LABEL] if record and LABEL in record else None
    if array is None or array.stype != _LABELS:
        raise FrameError("message without labels")
    if len(array.data) != expected * dtype.itemsize:
        raise FrameError(f"{len(array.data)} bytes of labels for {expected} samples")
    labels = torch.from_numpy(np.frombuffer(array.data, dtype).astype(np.int64))
    if int(labels.max()) >= classes:
        raise FrameError(f"label {int(labels.max())} of {classes} classes")
    return labels


# --- halves ---------------------------------------------------------------------------


def model_record(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Return tensors by name as exact frames; integers travel as float64."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        exact = tensor if tensor.is_floating_point() else tensor.double()
        record[name] = _frame_array(_EXACT.encode(exact))
    return record


def model_of(
    content: RecordDict, like: Mapping[str, torch.Tensor], kind: str = MODEL
) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a message, None if it has none.

    Parameters
    ----------
    content : RecordDict
        Content of the message.
    like : Mapping[str, torch.Tensor]
        Tensors by name, with the shapes, dtypes and device that those of the message
        must have and come out with.
    kind : str
        The record's name.

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


def kept_of(content: RecordDict, kind: str) -> dict[str, torch.Tensor]:
    """Return tensors that are kept for a client as they came, {} if there are none."""
    record = content.array_records.get(kind)
    if record is None:
        return {}
    return {name: compress.decode(_frame_bytes(a)) for name, a in record.items()}


# --- state ----------------------------------------------------------------------------


class LiveArray(Array):
    """An Array that holds a live tensor and becomes bytes only when it must.

    Engines that keep a client's state in memory serialise nothing; those that pickle it
    or send it elsewhere find an ordinary Array.

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
    """Return tensors by name as live arrays."""
    record = ArrayRecord()
    for name, tensor in tensors.items():  # the constructor would make them bytes
        record[name] = LiveArray(tensor)
    return record


def state_tensors(
    record: Mapping[str, Array], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the tensors of a state record: the live ones, else copies on a device."""
    tensors = {}
    for name, array in record.items():
        if isinstance(array, LiveArray):
            tensors[name] = array.__dict__["tensor"]
        else:
            dtype = getattr(torch, array.dtype)
            flat = torch.frombuffer(bytearray(array.data), dtype=dtype)
            tensors[name] = flat.view(array.shape).to(device)
    return tensors
