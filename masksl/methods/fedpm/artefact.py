"""The model of a finished run as a file: a seed, and one coded mask.

The file is one line of JSON, which ends with a newline, and a frame of `mask`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from masksl import model
from masksl.compress import FrameError, make
from masksl.methods.fedpm.frozen import Frozen
from masksl.methods.fedpm.votes import decode_mask

NAME = "model.fedpm"


def encode_mask(frozen: Frozen, mask: np.ndarray) -> bytes:
    """Return the frame of a mask, bool, shape (d,), coded by parameter."""
    return make("mask").encode(torch.from_numpy(mask), reference=frozen.layers)


def dump(frozen: Frozen, mask: np.ndarray, network: dict[str, Any]) -> bytes:
    """Return the content of the file.

    Parameters
    ----------
    frozen : Frozen
        The frozen weights.
    mask : numpy.ndarray
        Which of them are kept, bool, shape (d,).
    network : dict[str, str | int]
        Its name, ``model``; ``classes`` and ``channels``; ``stem_stride``.
    """
    facts = network | {"constant": frozen.constant, "seed": frozen.seed}
    return json.dumps(facts).encode() + b"\n" + encode_mask(frozen, mask)


def load(path: str | Path) -> nn.Module:
    """Load the model of a finished run.

    Parameters
    ----------
    path : str | Path
        The file ``model.fedpm`` of a run folder.

    Returns
    -------
    nn.Module
        The network in evaluation mode, on the CPU; weights that are not kept are zero.

    Raises
    ------
    FrameError
        If the file is broken, or of a network that this program does not have.
    """
    line, _, frame = Path(path).read_bytes().partition(b"\n")
    try:
        facts = json.loads(line)
        shape = facts["model"], int(facts["classes"]), int(facts["channels"])
        stride = int(facts.get("stem_stride", 1))
        units = model.build(*shape, seed=0, stem_stride=stride)
        module = nn.Sequential(*units)
        frozen = Frozen.of(module, float(facts["constant"]), int(facts["seed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(f"{path}: no model of FedPM ({error})") from error
    mask = torch.from_numpy(decode_mask(frame, frozen.elements, frozen.layers))
    module.load_state_dict(frozen.named(frozen.weights * mask))
    return module.eval()
