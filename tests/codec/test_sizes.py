"""Every frame has exactly the size that docs/frame.md gives for its header's fields.

Nothing of the compressors is used to compute it: layouts and sizes are written out here
as the page has them.
"""

import math
import struct
from collections.abc import Iterator
from decimal import ROUND_FLOOR, Decimal
from itertools import product
from typing import Any

import pytest
import torch
import zstandard

from masksl.codec import wire
from masksl.compress import COMPRESSORS, decode, make, options_of
from tests.codec import reference_decoder

Case = tuple[str, dict[str, Any]]

DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}
WIDTHS = {1: 2, 2: 2, 3: 4, 4: 8}
VALUES = ("float32", "bfloat16", "float16")
SCOPES = ("tensor", "sample")
PACKED, INFLATED, CODED, ROW, INDICES, GAPS = 0, 1, 3, 4, 16, 18
COUNTED = 1  # of masks
BITS = {1: 1, 2: 2, 4: 3}  # of a kept element of spsign, by the number of magnitudes
LAYOUTS = {
    "none": "<B",
    "qu": "<BBdd",
    "qq": "<BBdd",
    "fp": "<BBBBd",
    "sp": "<QBBB",
    "rt": "<QBBB",
    "ms": "<QBBBBB",
    "spsign": "<QBBB",
    "sign": "<Bd",
    "qsgd": "<BBd",
    "drive": "<BQ",
    "ec": "<BHBIIQ",
    "mask": "<BI",
}
SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (13,),
    (1, 1, 1, 1),
    (5, 7),
    (3, 4, 4),
    (3, 5, 3, 3),
    (4, 8, 6, 5),
    (2, 3, 2, 3, 5),
    (1, 2, 1, 3, 1, 7),
]


# --- sizes by the page ----------------------------------------------------------------


def symbols(count: int, bits: int) -> int:
    """Bytes of packed symbols; of more than 8 bits, a low byte each and the rest."""
    if bits > 8:
        return count + math.ceil(count * (bits - 8) / 8)
    return math.ceil(count * bits / 8)


def fields_of(header: wire.Header) -> tuple[Any, ...]:
    assert len(header.params) == struct.calcsize(LAYOUTS[header.compressor])
    return struct.unpack(LAYOUTS[header.compressor], header.params)


def before_plane(header: wire.Header) -> int:
    """Bytes of what lies before the plane: values, exact values, signs."""
    d, fields = header.elements, fields_of(header)
    w = WIDTHS[DTYPES[header.dtype]]
    match header.compressor, fields:
        case "none", (code,):
            return WIDTHS[code] * d
        case "qu" | "qq" | "sign" | "qsgd", _:
            return 0
        case "drive", (block, _):
            return (8 if w == 8 else 4) * math.ceil(d / 2**block)
        case "fp", (_, _, signed, _, _):
            return signed * symbols(d, 1)
        case "sp" | "rt", (k, scope, code, _):
            return rows(header.shape, scope) * k * WIDTHS[code]
        case "spsign", (k, magnitudes, _, _):
            return magnitudes * (8 if w == 8 else 4) + symbols(k, BITS[magnitudes])
        case "ms", (k, _, signed, scope, code, _):
            kept = rows(header.shape, scope) * k
            return kept * WIDTHS[code] + signed * symbols(d, 1)
        case "ec", (_, alphabet, signed, exact, _, _):
            centroids = len(range(1 if signed else 0, min(alphabet, 255)))
            return centroids * (8 if w == 8 else 4) + exact * w
    raise AssertionError(header.compressor)


def plane_of(header: wire.Header) -> tuple[int, int]:
    """Return form and bits of the plane."""
    match header.compressor, fields_of(header):
        case "none", _:
            return PACKED, 0
        case "qu" | "qq", (bits, form, _, _):
            return form, bits
        case "fp", (exponent, mantissa, _, form, _):
            return form, exponent + mantissa
        case "sign", (form, _):
            return form, 1
        case "qsgd", (levels, form, _):
            return form, (2 * levels).bit_length()
        case "drive", _:
            return PACKED, 1
        case "sp" | "rt" | "spsign", (_, _, _, form):
            return form, 1
        case "ms", (_, bits, _, _, _, form):
            return form, bits
    raise AssertionError(header.compressor)


def rows(shape: tuple[int, ...], scope: int) -> int:
    return shape[0] if scope and shape else 1


def implied(header: wire.Header, payload: bytes) -> int:
    """Return the size of a frame whose plane went through no lossless stage."""
    size = 28 + 4 * len(header.shape) + struct.calcsize(LAYOUTS[header.compressor])
    size += before_plane(header)
    fields = fields_of(header)
    if header.compressor == "ec":
        *_, length, negative = fields
        return size + length + symbols(negative, 1)
    form, bits = plane_of(header)
    if form in (INDICES, GAPS):
        scope = 0 if header.compressor == "spsign" else fields[1]
        kept = rows(header.shape, scope) * fields[0]
        if form == INDICES:
            return size + 4 * kept
        low, _, length = struct.unpack_from("<BHI", payload, before_plane(header))
        return size + 7 + length + symbols(kept, low)
    assert form == PACKED
    if header.compressor == "drive":
        return size + rotated(header.elements, fields[0]) // 8
    return size + symbols(header.elements, bits)


def rotated(count: int, block: int) -> int:
    """Return the elements of whole blocks and of the smallest one that holds the rest.

    It has a power of two of elements, at least eight.
    """
    whole, rest = divmod(count, 2**block)
    last = max(8, 2 ** math.ceil(math.log2(rest))) if rest else 0
    return whole * 2**block + last


def coded_plane(part: bytes, alphabet: int, shape: tuple[int, ...]) -> list[int]:
    """Return the symbols of a coded plane, of which no byte may be left over."""
    assert part[-1] or len(part) == 1
    return reference_decoder.plane(part, alphabet, shape)


def check_mask(tensor: torch.Tensor, form: int, payload: bytes) -> None:
    """Check the length of a mask: a bit an element, or a count and what it implies."""
    d, k = tensor.numel(), int(tensor.sum())
    if form == PACKED:
        assert len(payload) == symbols(d, 1)
        return
    count = max(1, math.ceil(k.bit_length() / 7))
    bits = math.log2(math.comb(d, k))
    assert count <= len(payload) <= count + math.ceil((bits + 1.01) / 8)
    assert len(payload) < symbols(d, 1)


# --- what is asked for ----------------------------------------------------------------


def kept_of(sparsity: float, count: int) -> int:
    share = 1 - Decimal(str(sparsity))
    return max(1, int((share * count).to_integral_value(ROUND_FLOOR)))


def asked(case: Case, tensor: torch.Tensor) -> dict[int, Any]:
    """Return the fields that options and tensor fix, by their place."""
    name, options = case
    if name == "mask":
        return {0: PACKED} if options["code"] == "packed" else {}
    shape, d = tuple(tensor.shape), tensor.numel()
    signed = int(bool((tensor < 0).any()))
    own = DTYPES[tensor.dtype]
    narrowed = DTYPES[getattr(torch, options.get("values", "float32"))]
    code = own if narrowed == 3 or own <= 2 else narrowed
    scope = SCOPES.index(options.get("scope", "tensor"))
    if name == "none":
        return {0: code}
    if name in ("qu", "qq"):
        return {0: options["bits"], 1: PACKED}
    if name == "fp":
        return dict(enumerate((options["exponent"], options["mantissa"], signed, 0)))
    if name == "sign":
        return {0: PACKED} | ({} if options["magnitude"] == "mean" else {1: 1.0})
    if name == "qsgd":
        return {0: options["levels"], 1: PACKED}
    if name == "drive":
        return {0: options["block"]}
    if name == "ec":
        return {0: CODED if options["context"] == "spatial" else ROW, 2: signed}
    k = kept_of(options["sparsity"], d // rows(shape, scope))
    if name == "spsign":
        return {0: k, 1: options["magnitudes"], 2: 0}
    if name == "ms":
        return dict(enumerate((k, options["bits"], signed, scope, code, PACKED)))
    fixed = {0: k, 1: scope, 2: code}
    if options["positions"] == "paper":
        indices = 4 * k * rows(shape, scope) < symbols(d, 1)
        fixed[3] = INDICES if indices else PACKED
    return fixed


def cases() -> Iterator[Case]:
    """Every compressor with every combination of its options."""
    for values in VALUES:
        yield "none", {"values": values}
    for bits, rounding in product(range(1, 17), ("nearest", "stochastic")):
        yield "qu", {"bits": bits, "rounding": rounding}
    for bits, offset in product(range(2, 9), (0.6, 0.99)):
        yield "qq", {"bits": bits, "offset": offset}
    for exponent, mantissa, scale in product(range(1, 6), range(8), ("absmax", "none")):
        if exponent + mantissa <= 8:
            yield "fp", {"exponent": exponent, "mantissa": mantissa, "scale": scale}
    selections = [
        {"sparsity": sparsity, "scope": scope, "values": values}
        for sparsity, scope, values in product((0, 0.6, 0.9, 0.99), SCOPES, VALUES)
    ]
    for selection, positions in product(selections, ("paper", "auto")):
        options = selection | {"positions": positions}
        yield "sp", options
        for alpha, evaluation in ((0, "topk"), (0.3, "topk"), (0.3, "random")):
            yield "rt", options | {"alpha": alpha, "evaluation": evaluation}
    for selection, bits in product(selections, range(1, 9)):
        for rounding in ("nearest", "floor"):
            yield "ms", selection | {"bits": bits, "rounding": rounding}
    for sparsity, magnitudes in product((0, 0.6, 0.9, 0.99), (1, 2, 4)):
        options = {"sparsity": sparsity, "magnitudes": magnitudes, "layout": "none"}
        yield "spsign", options
    for magnitude in ("none", "mean"):
        yield "sign", {"magnitude": magnitude}
    for levels in (1, 2, 6, 16, 127):
        yield "qsgd", {"levels": levels, "lossless": "none"}
    for block in (3, 4, 8, 14, 17):
        yield "drive", {"block": block}
    steer: list[dict[str, float]] = [
        *({"step": step} for step in (0.004, 0.5)),
        *({"bits": bits} for bits in (1.0, 6.0)),
        *({"error": error} for error in (0.01, 0.25)),
    ]
    for option, deadzone, context in product(steer, (None, 0.6), ("spatial", "none")):
        yield "ec", option | {"deadzone": deadzone, "context": context}
    for step, context in product((0.004, 0.5, 4.0), ("spatial", "none")):
        yield "ec", {"step": step, "rounding": "stochastic", "context": context}

    for code in ("auto", "packed"):
        yield "mask", {"code": code}


CASES = list(cases())


def tensors() -> Iterator[torch.Tensor]:
    """Signed, ReLU-like and zero tensors of every shape and dtype."""
    for shape, dtype in product(SHAPES, DTYPES):
        normal = torch.randn(shape).to(dtype)
        yield from (normal, normal.relu(), torch.zeros(shape, dtype=dtype))


def masks() -> Iterator[torch.Tensor]:
    """Masks of every shape and share of ones."""
    for shape, share in product(SHAPES, (0, 0.01, 0.1, 0.5, 0.95, 1)):
        yield torch.rand(shape) < share


@pytest.mark.parametrize("name", list(COMPRESSORS))
def test_every_option_is_varied(name: str) -> None:
    varied = [options for case, options in CASES if case == name]
    for option in set(options_of(name)) - {"lossless", "alpha", "evaluation", "layout"}:
        assert len({options.get(option) for options in varied}) > 1, option


@pytest.mark.parametrize("name", list(COMPRESSORS))
def test_frames_are_as_long_as_their_fields_imply(name: str) -> None:
    forms = set()
    # Of the many combinations a part is taken that meets every option and tensor.
    every = 7 if name in ("sp", "rt", "ms", "ec") else 1
    chosen = [case for case in CASES if case[0] == name]
    given = list(masks() if name == "mask" else tensors())
    for number, (case, tensor) in enumerate(product(chosen, given)):
        if number % every:
            continue
        frame = make(name, **case[1]).encode(tensor, seed=number, training=True)
        header, payload = wire.parse(frame)
        fields = fields_of(header)
        if name == "mask":
            check_mask(tensor, fields[0], bytes(payload))
        else:
            assert len(frame) == implied(header, bytes(payload)), (case, tensor.shape)
        for place, value in asked(case, tensor).items():
            assert fields[place] == value, (case, tensor.shape, place)
        assert decode(frame).shape == tensor.shape
        forms.add(fields[0] if name in ("ec", "mask") else plane_of(header)[0])
    expected = {
        **dict.fromkeys(("sp", "rt", "spsign"), {PACKED, INDICES, GAPS}),
        "ec": {CODED, ROW},
        "mask": {PACKED, COUNTED},
    }
    assert forms == expected.get(name, {PACKED})


@pytest.mark.parametrize("name", ["sp", "rt"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99, 0.999])
def test_auto_takes_the_cheapest_positions(name: str, sparsity: float) -> None:
    tensor = torch.randn(31, 997)
    d, frames = tensor.numel(), []
    for positions in ("paper", "auto"):
        compressor = make(name, sparsity=sparsity, positions=positions)
        frames.append(compressor.encode(tensor))
    k = kept_of(sparsity, d)
    paper, auto = (len(frame) - 36 - 11 - 4 * k for frame in frames)
    assert paper == min(math.ceil(d / 8), 4 * k)
    assert auto < paper or sparsity == 0.5 and auto == paper


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("step", [0.004, 0.02, 0.5])
def test_parts_of_ec_add_up(signed: bool, dtype: torch.dtype, step: float) -> None:
    """Centroids, exact values, a coded plane and signs, each as long as it says."""
    for shape in ((6, 5, 9, 7), (333,)):
        tensor = torch.randn(shape).to(dtype)
        tensor = tensor if signed else tensor.relu()
        frame = make("ec", step=step).encode(tensor)
        header, payload = wire.parse(frame)
        _, alphabet, sign, exact, length, negative = fields_of(header)
        start = before_plane(header)
        found = coded_plane(bytes(payload[start:][:length]), alphabet, shape)
        assert found.count(255) == exact and max(found) + 1 == alphabet
        assert negative == (len(found) - found.count(0)) * signed
        assert len(payload) == start + length + symbols(negative, 1)
        # With signs symbol 0 has none; without, none is sent.
        assert sign == signed
        assert (0 < negative <= tensor.numel()) == signed
        assert (alphabet == 256) == (exact > 0)
        assert step == 0.02 or (exact > 0) == (step == 0.004)


@pytest.mark.parametrize("lossless", ["fast", "context", "auto"])
@pytest.mark.parametrize("name", ["qu", "qq", "fp", "sp", "rt", "ms"])
def test_the_lossless_stage_changes_the_plane_alone(name: str, lossless: str) -> None:
    """What lies before the plane is the same; the plane is as long as it says."""
    seen = set()
    maps = torch.nn.functional.interpolate(torch.randn(6, 8, 5, 5), scale_factor=2.4)
    options = {"sparsity": 0.9} if name in ("sp", "rt", "ms") else {}
    for tensor in (maps, maps.relu(), torch.randn(301)):
        shape = tuple(tensor.shape)
        plain, staged = (
            wire.parse(make(name, **options, lossless=stage).encode(tensor))
            for stage in ("none", lossless)
        )
        assert fields_of(plain[0])[0] == fields_of(staged[0])[0]
        start = before_plane(staged[0])
        assert start == before_plane(plain[0])
        assert staged[1][:start] == plain[1][:start]
        form, bits = plane_of(staged[0])
        part, packed = bytes(staged[1][start:]), bytes(plain[1][start:])
        seen.add(form)
        if form == INFLATED:
            assert zstandard.ZstdDecompressor().decompress(part) == packed
        elif form == CODED:
            found = coded_plane(part, 2**bits, shape)
            assert found == reference_decoder.bits_of(packed, bits, len(found))
        else:
            assert part == packed
        assert len(part) < len(packed) or form == PACKED
    assert seen & {INFLATED, CODED}
