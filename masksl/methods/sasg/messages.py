"""Message types and records of SASG."""

import struct
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from masksl.compress import FrameError
from masksl.runtime.messages import FRAMES, arrays_of, raw_of, raw_record

TRAIN = "train.gradient"
BUFFERS = "evaluate.buffers"

UPDATE = "update"
THRESHOLD = "threshold"
SENDERS = "senders"
SKIP = "skip"
BUFFER = "buffer"

_NUMBER = struct.Struct("<d")
_SKIPPED = b"\x01"


def threshold_record(threshold: float) -> ArrayRecord:
    """Return a record of the threshold of an iteration: 8 bytes."""
    return raw_record(_NUMBER.pack(threshold))


def threshold_of(content: RecordDict) -> float | None:
    """Return the threshold of a message, None if it has none."""
    if arrays_of(content, THRESHOLD) is None:
        return None
    (threshold,) = _NUMBER.unpack(raw_of(content, THRESHOLD, _NUMBER.size))
    if not threshold >= 0:
        raise FrameError(f"threshold of {threshold}")
    return float(threshold)


def skip_record() -> ArrayRecord:
    """Return the record by which a worker says that it uploads nothing: 1 byte."""
    return raw_record(_SKIPPED)


def has_skipped(content: RecordDict) -> bool:
    """Return whether a reply says that its worker uploads nothing."""
    if arrays_of(content, SKIP) is None:
        return False
    if raw_of(content, SKIP, 1) != _SKIPPED or UPDATE in content:
        raise FrameError("skip with another content")
    return True


def senders_record(senders: Sequence[int], workers: int) -> ArrayRecord:
    """Return a record of who sent the relayed uploads: a bit for each worker."""
    flags = np.zeros(workers, np.uint8)
    flags[list(senders)] = 1
    return raw_record(np.packbits(flags, bitorder="little").tobytes())


def relay_record(frames: Mapping[int, bytes], dense: int) -> ArrayRecord:
    """Return a record of other workers' frame-sets, each of so many bytes if dense."""
    record = ArrayRecord()
    for number, data in sorted(frames.items()):
        record[str(number)] = Array(
            dtype="uint8", shape=(dense,), stype=FRAMES, data=data
        )
    return record


def relayed(content: RecordDict, workers: int) -> dict[int, bytes]:
    """Return the frame-sets of a message by the worker that uploaded them.

    Raises
    ------
    FrameError
        If there are not as many as senders.
    """
    packed = np.frombuffer(raw_of(content, SENDERS, -(-workers // 8)), np.uint8)
    flags = np.unpackbits(packed, bitorder="little")
    numbers = np.flatnonzero(flags).tolist()
    record = arrays_of(content, UPDATE)
    arrays = list(record.values()) if record is not None else []
    frames = [array.data for array in arrays if array.stype == FRAMES]
    if len(frames) != len(numbers) or any(n >= workers for n in numbers):
        raise FrameError(f"{len(frames)} uploads of the workers {numbers}")
    return dict(zip(numbers, frames, strict=True))
