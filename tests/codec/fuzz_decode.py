"""Coverage-guided fuzzing of `decode`: any bytes give a tensor or a `FrameError`.

Inputs are frames whose length and checksum are put right before they are decoded, so
that mutations get past these. Compressed parts may lie in them as they are, so that
mutations reach what is compressed. Shapes of up to 2**22 elements are declared. A call
must end within two seconds; beside the tensor it may take 4 bytes an element. Not
collected by pytest; it needs atheris::

    PYTHONPATH=. python tests/codec/fuzz_decode.py -max_total_time=600 FOLDER

FOLDER takes the corpus, begun with frames of every compressor and option.
"""

import math
import random
import struct
import sys
import time
import zlib
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import atheris

import masksl.codec.kernels  # noqa: F401  # Numba compiles no instrumented functions
import masksl.codec.kernels_dct  # noqa: F401

with atheris.instrument_imports(include=["masksl"]):
    from masksl import compress
    from masksl.codec import planes, wire

import torch

from tests.codec.test_frames import memory

ELEMENTS = 2**22
SECONDS = 2.0  # of this process's time
CONSTANT = 16 * 2**20  # bytes: contexts, tables, blocks
LENGTH = 8192
SHAPES = [(), (7,), (33, 9), (2, 3, 8, 8), (5, 2, 4, 3, 6), (4, 2, 16, 16)]

_inflate = planes._inflated


def main() -> None:
    """Write the seeds and fuzz."""
    torch.set_num_threads(1)
    planes._inflated = inflate
    for folder in [Path(a) for a in sys.argv[1:] if not a.startswith("-")]:
        folder.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(seeds()):
            (folder / f"seed-{number:04}").write_bytes(frame)
    options = [
        f"-max_len={LENGTH}",
        "-timeout=30",
        "-reduce_inputs=0",
        "-len_control=0",
    ]
    arguments = [sys.argv[0], *options, "-use_value_profile=1", *sys.argv[1:]]
    atheris.Setup(arguments, check, custom_mutator=mutate)
    atheris.Fuzz()


def check(data: bytes) -> None:
    """Decode one input."""
    frame = sealed(data)
    given = reference(frame)
    began, before = time.process_time(), memory("VmRSS", reset_peak=True)
    try:
        tensor = compress.decode(frame, max_elements=ELEMENTS, **given)
    except compress.FrameError:
        tensor = None
    spent, grown = time.process_time() - began, memory("VmHWM") - before
    allowed = 0 if tensor is None else tensor.nbytes
    if spent > SECONDS or grown > allowed + 4 * declared(frame) + CONSTANT:
        raise RuntimeError(f"{spent:.1f} s, {grown} bytes more")
    if tensor is not None:
        shape = struct.unpack_from(f"<{frame[6]}I", frame, 28)
        if tuple(tensor.shape) != shape or math.prod(shape) > ELEMENTS:
            raise RuntimeError(f"shape {tuple(tensor.shape)}, expected {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise RuntimeError("values that are not finite")
        if compress.has_positions(frame[8:16].rstrip(b"\0").decode()):
            positions = compress.kept_positions(frame)
            if bool((tensor.view(-1).index_fill(0, positions, 0) != 0).any()):
                raise RuntimeError("elements that were not kept")


def declared(frame: bytes) -> int:
    """Return how many elements a frame declares, 0 if they are too many."""
    try:
        count = wire.declared_elements(frame)
    except compress.FrameError:
        return 0
    return count if count <= ELEMENTS else 0


def reference(frame: bytes) -> dict[str, torch.Tensor]:
    """Return what masks are coded by, as an argument of `decode`."""
    if frame[8:16] != b"mask\0\0\0\0":
        return {}
    try:
        return {"reference": levels(wire.declared_elements(frame))}
    except compress.FrameError:
        return {}


def levels(count: int) -> torch.Tensor:
    """Return the levels of a mask's elements, as many as may be decoded at most."""
    return torch.arange(min(count, ELEMENTS)) // 2 % 5


def sealed(data: bytes) -> bytes:
    """Return an input with the length and the checksum that its bytes call for."""
    frame = bytearray(data)
    if len(frame) < 28:
        return data
    start = 28 + 4 * frame[6] + frame[7]
    frame[20:28] = struct.pack("<Q", max(0, len(frame) - start))
    checksum = zlib.crc32(bytes(frame[:16]) + bytes(frame[20:]))
    frame[16:20] = struct.pack("<I", checksum)
    return bytes(frame)


def inflate(data: memoryview, size: int) -> bytes:
    """Decompress; what is as long as it should be may be as it is."""
    try:
        return _inflate(data, size)
    except compress.FrameError:
        if len(data) == size:
            return bytes(data)
        raise


def mutate(data: bytes, limit: int, seed: int) -> bytes:
    """Change one part of a frame, most often so that the others stay in their place."""
    rng = random.Random(seed)
    if len(data) < 28 or rng.random() < 0.1:
        return atheris.Mutate(data, limit)
    params = 28 + 4 * data[6]
    payload = params + data[7]
    inside = rng.randrange(payload, max(payload + 1, len(data)))
    few = (inside, inside + rng.choice((1, 2, 4, 12)))
    spans = [(28, params), (params, payload), (payload, len(data)), few, few, few]
    if rng.random() < 0.1 and data[6]:  # a larger shape
        wider = struct.pack("<I", 2 ** rng.randrange(23))
        at = 28 + 4 * rng.randrange(data[6])
        return data[:at] + wider + data[at + 4 :]
    low, high = rng.choice(spans)
    part = data[low:high]
    changed = bytes(atheris.Mutate(part or b"\0", max(1, limit - len(data))))
    if low < payload or rng.random() < 0.9:
        changed = changed[: len(part)].ljust(len(part), b"\0")
    return data[:low] + changed + data[high:]


def seeds() -> list[bytes]:
    """Return frames of every compressor and option, their parts compressed or not."""
    frames: list[bytes] = []
    stored = SimpleNamespace(compress=bytes)
    plain = SimpleNamespace(ZstdCompressor=lambda level: stored)
    for (name, options), shape in product(cases(), SHAPES):
        generator = torch.Generator().manual_seed(len(frames))
        signed = torch.randn(shape, generator=generator)
        if shape[-2:] == (16, 16):  # maps whose neighbours are alike, unequal channels
            signed = (
                signed[..., ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)
            )
            signed[:, 1] = signed[:, 1].round()
        compressor = compress.make(name, **options)
        if name == "mask":
            known = levels(signed.numel()).view(shape)
            frames += [
                compressor.encode(tensor, reference=by)
                for tensor in (
                    signed > 0,
                    signed > 1,
                    known > 2,
                    (known > 2) ^ (signed > 2),
                )
                for by in (known, None)
            ]
            continue
        for tensor in (signed, signed.relu().to(torch.float16), signed.double()):
            frames.append(compressor.encode(tensor))
            with mock.patch.object(planes, "zstandard", plain):
                frames.append(compressor.encode(tensor))
    return sorted({frame for frame in frames if len(frame) <= LENGTH})


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Return compressors with options that take every branch of a decoder."""
    stages: list[dict[str, Any]] = [
        {"lossless": stage} for stage in ("none", "fast", "context")
    ]
    kept: list[dict[str, Any]] = [
        {"sparsity": sparsity, "scope": scope, "values": values}
        for sparsity in (0.5, 0.98)
        for scope in ("tensor", "sample")
        for values in ("float32", "bfloat16")
    ]
    groups: dict[str, list[dict[str, Any]]] = {
        "none": [{"values": values} for values in ("float32", "float16")],
        "qu": [s | {"bits": bits} for s in stages for bits in (3, 8, 11)],
        "qq": stages,
        "fp": stages,
        "sp": [k | s for k in kept for s in (*stages, {"positions": "auto"})],
        "rt": [{"sparsity": 0.9}],
        "ms": [k | s | {"bits": b} for k in kept for s in stages for b in (1, 2, 3)],
        "mask": [{"code": code} for code in ("auto", "packed")],
        "ec": [
            steer | {"context": context}
            for steer in ({"step": 0.005}, {"error": 0.01}, {"error": 0.25})
            for context in ("none", "spatial")
        ],
    }
    return [(name, options) for name, group in groups.items() for options in group]


if __name__ == "__main__":
    main()
