"""MS: mask-encoded sparsification."""

import struct
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from masksl.codec import planes, scalar, topk, wire
from masksl.codec.base import (
    Bounds,
    Compressor,
    Device,
    FrameError,
    Header,
    Packed,
    Shape,
)
from masksl.codec.bits import BLOCK, pack_bits, spans
from masksl.codec.options import check_choice, check_sparsity, check_whole


@dataclass(frozen=True)
class MaskSparsification(Compressor):
    """MS: the largest elements exactly, all others by a mask of a few bits.

    With k elements kept, t the smallest of their magnitudes and ``L = 2**bits - 1``,
    a kept element has the mask symbol L and sends its value; any other has the symbol
    of its level, a multiple of t/L below t. It costs ``bits`` an element and the values
    of those kept, and a sign bit an element where the tensor has negative values.

    Parameters
    ----------
    sparsity : float
        Share of the elements that is not kept, at least 0, less than 1;
        ``k = floor((1 - sparsity) d)``, at least 1. Of equal magnitudes the lower
        index is kept.
    bits : int
        1 to 8, bits of a mask symbol. With 1 bit it keeps and drops what `sp` does.
    rounding : str
        ``nearest`` level, as in the public code and the paper's figures, or ``floor``,
        as in its text. Symbols of elements not kept are at most L - 1 in both.
    scope : str
        ``tensor`` keeps k of all d elements, ``sample`` k of each sample's, with a t of
        its own.
    values : str
        Type of sent values: ``float32`` is the tensor's own, ``bfloat16`` and
        ``float16`` take 16 bits; t is computed from the values as sent.
    lossless : str
        Stage over the mask: ``none``, ``fast``, ``context`` or ``auto``.

    References
    ----------
    "Mask-Encoded Sparsification: Mitigating Biased Gradients in
    Communication-Efficient Split Learning", ECAI 2024, algorithms 1 and 2.
    """

    name: ClassVar[str] = "ms"
    sparsity: float = 0.99
    bits: int = 2
    rounding: str = "nearest"
    scope: str = "tensor"
    values: str = "float32"
    lossless: str = "none"

    _PARAMS: ClassVar[struct.Struct] = struct.Struct("<QBBBBB")

    def __post_init__(self) -> None:
        """Check the options."""
        check_sparsity(self.sparsity)
        check_whole("bits", self.bits, 1, 8)
        check_choice("rounding", self.rounding, ("nearest", "floor"))
        check_choice("scope", self.scope, planes.SCOPES)
        check_choice("values", self.values, planes.VALUES)
        check_choice("lossless", self.lossless, planes.LOSSLESS)

    def pack(
        self, flat: Tensor, shape: Shape, bounds: Bounds, *, seed: int, training: bool
    ) -> Packed:
        """Compress the elements of a tensor, see `Compressor.pack`."""
        work = planes.working(flat)
        rows = planes.rows(shape, self.scope)
        kept = topk.kept(self.sparsity, flat.numel() // rows)
        signed = bounds[0] < 0
        magnitude = (work.abs() if signed else work).view(rows, -1)
        chosen = topk.largest(magnitude, kept)
        values = planes.narrow(flat[chosen], self.values, bounds, self.name)
        smallest = planes.working(values).to(work.dtype).view(rows, kept).abs()
        symbols = self._symbols(magnitude, smallest.amin(1, keepdim=True))
        symbols.index_fill_(0, chosen, 2**self.bits - 1)
        form, plane = planes.write_plane(symbols, self.bits, shape, self.lossless)
        signs = [pack_bits((work < 0).view(torch.uint8), 1)] if signed else []
        scope, dtype = planes.SCOPES.index(self.scope), wire.DTYPE_CODES[values.dtype]
        params = self._PARAMS.pack(kept, self.bits, signed, scope, dtype, form)
        return params, [values, *signs, plane]

    def _symbols(self, magnitude: Tensor, smallest: Tensor) -> Tensor:
        """Return the mask of elements that are not kept, uint8, shape (d,).

        Where fewer than k elements of a row differ from zero, t is zero and so are all
        that are not kept.
        """
        top = 2**self.bits - 1
        divisor = smallest.masked_fill(smallest == 0, 1)

        def level(part: Tensor, by: Tensor = divisor) -> Tensor:
            scaled = (part / by).mul_(top)
            if self.rounding == "nearest":
                scaled.round_()
            # Values narrowed to 16 bits can put t below elements that are not kept.
            return scaled.clamp_(max=top - 1)

        if len(divisor) > 1:
            return level(magnitude).to(torch.uint8).view(-1)
        return scalar.to_symbols(magnitude.view(-1), partial(level, by=divisor[0]))

    @classmethod
    def unpack(cls, header: Header, payload: memoryview, device: Device) -> Tensor:
        """Decompress the elements of a tensor, see `Compressor.unpack`."""
        kept, bits, signed, scope, code, form = header.unpack_params(cls._PARAMS)
        rows = planes.check_kept(header, kept, scope)
        if not 1 <= bits <= 8 or signed > 1:
            raise FrameError(f"ms frame declares {bits} bits and sign form {signed}")
        dtype, top = planes.value_dtype(header, code), 2**bits - 1
        size = rows * kept * dtype.itemsize
        sent, signs, plane = planes.split(
            header, payload, size, planes.sign_bytes(header, signed)
        )
        # Levels in units of t/L; -1 marks kept elements until they are filled in.
        units = torch.arange(
            2**bits, dtype=planes.working_dtype(header.dtype), device=device
        )
        units[top] = -1
        marked = top, rows * kept
        flat = planes.read_plane(header, plane, bits, form, lambda: units, marked)
        if rows > 1:
            cls._check_rows(flat, rows, kept)
        values = planes.Values(header, sent, dtype, device)
        level = cls._smallest(values, rows, kept) / scalar.number(top, flat)
        flat.view(rows, -1).mul_(level)
        # Kept elements are less than zero still, or the zero with a sign.
        packed = wire.to_tensor(signs, torch.uint8, device)
        out = flat if flat.dtype == header.dtype else flat.to(header.dtype)
        start = 0
        for span in spans(flat):
            chosen = topk.with_sign(flat[span], rows * kept)
            if signed:
                planes.negate(out[span], packed, span)
            stop = start + len(chosen)
            out[span].index_copy_(0, chosen, values.part(start, stop))
            start = stop
        return out

    @staticmethod
    def _smallest(values: planes.Values, rows: int, kept: int) -> Tensor:
        """Return the smallest magnitude of every row, shape (rows, 1)."""
        step = max(1, BLOCK // kept) * kept if rows > 1 else BLOCK
        if torch.device(values.device).type != "cpu":
            step = values.count
        found = []
        for start in range(0, values.count, step):
            part = planes.working(values.part(start, min(start + step, values.count)))
            found.append(part.view(-1, kept if rows > 1 else len(part)).abs().amin(1))
        smallest = torch.cat(found)
        return (smallest if rows > 1 else smallest.amin(0, keepdim=True)).view(-1, 1)

    @staticmethod
    def _check_rows(flat: Tensor, rows: int, kept: int) -> None:
        """Raise `FrameError` unless as many elements are marked in every row."""
        start = 0
        for span in spans(flat):
            chosen = topk.with_sign(flat[span], rows * kept) + span.start
            order = torch.arange(start, start + len(chosen), device=flat.device)
            if not torch.equal(chosen // (len(flat) // rows), order // kept):
                raise FrameError(
                    f"ms frame does not keep {kept} elements of every sample"
                )
            start += len(chosen)
