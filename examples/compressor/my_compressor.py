"""A compressor of one's own: every element is a whole number of steps, in a byte."""

import struct
from dataclasses import dataclass

import torch

from masksl.codec.options import check_whole
from masksl.codec.wire import check_payload, to_tensor
from masksl.compress import Compressor, register


@register
@dataclass(frozen=True)
class MyCompressor(Compressor):
    """Divides the largest magnitude into ``steps`` and rounds to the nearest step."""

    name = "mine"
    steps: int = 127

    def __post_init__(self):
        check_whole("steps", self.steps, 1, 127)

    def pack(self, flat, shape, bounds, *, seed, training):
        step = max(-bounds[0], bounds[1]) / self.steps or 1.0
        return struct.pack("<d", step), [(flat.double() / step).round().to(torch.int8)]

    @classmethod
    def unpack(cls, header, payload, device):
        (step,) = header.unpack_params(struct.Struct("<d"))
        check_payload(header, payload, header.elements)
        return to_tensor(payload, torch.int8, device).double() * step
