"""Message types and records of federated averaging."""

import struct

from flwr.app import Array, ArrayRecord, RecordDict

from masksl.compress import FrameError
from masksl.runtime.messages import arrays_of
from masksl.training.score import Score

TRAIN = "train.local"
EVALUATE = "evaluate.local"

UPDATE = "update"
SCORE = "score"

_SCORES = "masksl.score"
_FIELDS = struct.Struct("<dII")  # sum of losses, top-1 and top-5 hits


def score_record(score: Score) -> ArrayRecord:
    """Return a record of a score: 16 bytes, the number of samples left out."""
    data = _FIELDS.pack(score.loss, score.top1, score.top5)
    record = ArrayRecord()
    record[SCORE] = Array(dtype="uint8", shape=(len(data),), stype=_SCORES, data=data)
    return record


def score_of(content: RecordDict, samples: int) -> Score:
    """Return the score of a message.

    Parameters
    ----------
    content : RecordDict
        Content of the message.
    samples : int
        Samples of the client's shard.

    Raises
    ------
    FrameError
        If there is none, or it cannot be one of so many samples.
    """
    record = arrays_of(content, SCORE)
    array = record[SCORE] if record and SCORE in record else None
    if array is None or array.stype != _SCORES or len(array.data) != _FIELDS.size:
        raise FrameError("message without a score")
    loss, top1, top5 = _FIELDS.unpack(array.data)
    if not top1 <= top5 <= samples:
        raise FrameError(f"score of {top1} and {top5} hits among {samples} samples")
    return Score(samples, loss, top1, top5)
