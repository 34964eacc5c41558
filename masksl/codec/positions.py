"""Positions of kept elements: as a plane of one bit, as indices or as gaps."""

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from masksl.codec import planes, topk, wire
from masksl.codec.bits import BLOCK, chunks, packed_size, spans
from masksl.codec.gaps import encode_gaps, gap_blocks
from masksl.codec.wire import FrameError

_INDICES, _GAPS = 16, 18  # forms beside those of planes


class Values(Protocol):
    """The values of kept elements, in order of position."""

    count: int

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Return values, shape (stop - start,), of the type of the frame's tensor."""


def write_positions(
    chosen: torch.Tensor, shape: tuple[int, ...], lossless: str, *, gaps: bool
) -> tuple[int, wire.Part]:
    """Encode positions in the smallest allowed form; return the form and the bytes.

    Parameters
    ----------
    chosen : torch.Tensor
        int64, shape (k,): ascending positions in the flat tensor.
    shape : tuple[int, ...]
        Shape of the tensor.
    lossless : str
        Stage over the bitmap, see `planes.write_plane`.
    gaps : bool
        Whether the gaps between positions may be coded.
    """
    count = math.prod(shape)
    best: tuple[int, wire.Part] | None = None
    size = packed_size(count, 1)  # of the plane, which is made where it is needed
    if lossless != "none":
        best = _plane(chosen, shape, lossless)
        size = len(best[1]) if isinstance(best[1], bytes) else best[1].numel()
    if 4 * chosen.numel() < size and count <= 2**31:
        best = _INDICES, chosen.to(torch.int32)
        size = 4 * chosen.numel()
    if gaps:
        coded = encode_gaps(chosen.cpu().numpy(), count)
        if coded is not None and len(coded) < size:
            best = _GAPS, coded
    return best or _plane(chosen, shape, lossless)


def _plane(
    chosen: torch.Tensor, shape: tuple[int, ...], lossless: str
) -> tuple[int, wire.Part]:
    """Return form and bytes of the plane that has a bit for every element."""
    mask = torch.zeros(math.prod(shape), dtype=torch.uint8, device=chosen.device)
    mask[chosen] = 1
    return planes.write_plane(mask, 1, shape, lossless)


def read_positions(
    header: wire.Header,
    payload: memoryview,
    kept: int,
    form: int,
    device: torch.device | str,
) -> torch.Tensor:
    """Undo `write_positions`: int64, shape (kept,), ascending, within the elements."""
    if form in (_INDICES, _GAPS):
        chosen = torch.empty(kept, dtype=torch.int64)
        start = 0
        for block in _blocks(header, payload, kept, form):
            chosen[start : start + len(block)] = block
            start += len(block)
        return wire.to_device(chosen, device)
    mask = _read_mask(header, payload, kept, form, device)
    return topk.positions(mask, kept)


def place(
    header: wire.Header,
    payload: memoryview,
    form: int,
    values: Values,
    device: torch.device | str,
) -> torch.Tensor:
    """Return a tensor of zeros with values at the encoded positions.

    Parameters
    ----------
    header : wire.Header
        Header of the frame.
    payload : memoryview
        What `write_positions` returned.
    form : int
        Likewise.
    values : Values
        The value of each position.
    device : torch.device | str
        Device of the tensor.

    Returns
    -------
    torch.Tensor
        Shape (d,), of the header's type.
    """
    kept, start = values.count, 0
    if form in (_INDICES, _GAPS):
        blocks = _blocks(header, payload, kept, form)
        flat = torch.zeros(header.elements, dtype=header.dtype, device=device)
        for chosen in blocks if flat.device.type == "cpu" else [torch.cat([*blocks])]:
            stop = start + len(chosen)
            chosen = wire.to_device(chosen, device)
            flat.index_copy_(0, chosen, values.part(start, stop))
            start = stop
        return flat
    mask = _read_mask(header, payload, kept, form, device)
    flat = torch.zeros(header.elements, dtype=header.dtype, device=device)
    fill(flat, mask, values)
    return flat


def fill(flat: torch.Tensor, mask: torch.Tensor, values: Values) -> None:
    """Write values to the elements of a tensor that a mask has, in order."""
    start = 0
    for span in spans(flat):
        chosen = topk.positions(mask[span], values.count)
        stop = start + len(chosen)
        flat[span].index_copy_(0, chosen, values.part(start, stop))
        start = stop


def _read_mask(
    header: wire.Header,
    payload: memoryview,
    kept: int,
    form: int,
    device: torch.device | str,
) -> torch.Tensor:
    """Return whether each element is kept, bool, shape (d,)."""
    levels = torch.arange(2, device=device) > 0
    return planes.read_plane(header, payload, 1, form, lambda: levels, (1, kept))


def _blocks(
    header: wire.Header, payload: memoryview, kept: int, form: int
) -> Iterator[torch.Tensor]:
    """Check positions, then return them in blocks, int64, on the CPU."""
    if form == _GAPS:
        gaps = gap_blocks(payload, kept, header.elements)
        return (torch.from_numpy(block) for block in gaps)
    wire.check_payload(header, payload, 4 * kept)
    for part in chunks(payload, "<u4"):
        if part[-1] >= header.elements or np.any(part[1:] <= part[:-1]):
            raise FrameError(
                f"{header.compressor} frame has indices that do not ascend "
                f"within its {header.elements} elements"
            )
    indices = np.frombuffer(payload, "<u4")
    return (
        torch.from_numpy(indices[start : start + BLOCK].astype(np.int64))
        for start in range(0, kept, BLOCK)
    )
