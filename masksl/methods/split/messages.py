"""Message types and records of split learning."""

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict

from masksl.compress import FrameError
from masksl.runtime.messages import arrays_of

FORWARD = "train.forward"
BACKWARD = "train.backward"
EVALUATE = "evaluate.forward"
COLLECT = "evaluate.buffers"
MEASURE = "query.gradient"

ACTIVATION = "activation"
GRADIENT = "gradient"
EXACT_GRADIENT = "gradient.exact"
LABEL = "label"
UPDATE = "update"
OPTIMIZER = "optimizer"
BUFFER = "buffer"

# Measurements: relative errors of a gradient, and of the client half's weight gradient.
ERROR, WEIGHT_ERROR = "gradient_error", "weight_gradient_error"

_LABELS = "masksl.labels"


def label_record(labels: torch.Tensor, classes: int) -> ArrayRecord:
    """Return a record of labels: uint8 up to 256 classes, else uint16."""
    packed = labels.cpu().numpy().astype(_dtype(classes))
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
        Expected number of labels.

    Returns
    -------
    torch.Tensor
        int64, shape (expected,), on the CPU.

    Raises
    ------
    FrameError
        If labels are missing, too many, too few, or not below ``classes``.
    """
    dtype = _dtype(classes)
    record = arrays_of(content, LABEL)
    array = record[LABEL] if record and LABEL in record else None
    if array is None or array.stype != _LABELS:
        raise FrameError("message without labels")
    if len(array.data) != expected * dtype.itemsize:
        raise FrameError(f"{len(array.data)} bytes of labels for {expected} samples")
    labels = torch.from_numpy(np.frombuffer(array.data, dtype).astype(np.int64))
    if int(labels.max()) >= classes:
        raise FrameError(f"label {int(labels.max())} of {classes} classes")
    return labels


def _dtype(classes: int) -> np.dtype:
    return np.dtype("<u1" if classes <= 256 else "<u2")
