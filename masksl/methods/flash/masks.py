"""The masks that the server knows, and who holds which."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord

from masksl.methods.flash.coding import MaskCoding, Versioned
from masksl.methods.flash.start import FIRST
from masksl.runtime.clients import ClientInfo
from masksl.runtime.messages import raw_record
from masksl.training.tensors import Tensors


@dataclass
class Masks:
    """Masks by version, as long as somebody refers to them.

    Parameters
    ----------
    coding : MaskCoding
        Turns them into bytes.

    Attributes
    ----------
    current : int
        Version of the mask of all clients, 0 before there is one.
    newest : int
        The last version that was given out.
    own : dict[int, int]
        Under ``nst``, version of each client's mask, by client; that of the others is
        the current one.
    """

    coding: MaskCoding
    current: int = 0
    newest: int = 0
    own: dict[int, int] = field(default_factory=dict)
    _packed: dict[int, np.ndarray] = field(default_factory=dict)
    _unpacked: dict[int, np.ndarray] = field(default_factory=dict)
    _records: dict[tuple[int, int], ArrayRecord] = field(default_factory=dict)

    def begin(self, counts: Sequence[int]) -> None:
        """Draw the first mask, given the weights of each layer that it keeps."""
        self.store(FIRST, self.coding.start.mask(counts))
        self.current = self.newest = FIRST

    def store(self, version: int, mask: np.ndarray) -> None:
        """Keep a mask, bool, shape (n,), under a version."""
        self._packed[version] = np.packbits(mask)
        self._unpacked[version] = mask
        self.newest = max(self.newest, version)

    def add(self, mask: np.ndarray) -> int:
        """Keep a mask under a new version, and return that."""
        self.store(self.newest + 1, mask)
        return self.newest

    def __getitem__(self, version: int) -> Versioned:
        """Return the mask of a version."""
        if version not in self._unpacked:
            count = self.coding.start.layers.elements
            bits = np.unpackbits(self._packed[version], count=count)
            self._unpacked[version] = bits.view(bool)
        return Versioned(version, self._unpacked[version])

    def held_by(self, client: ClientInfo) -> Versioned | None:
        """Return the mask that a client holds, None if it has none or is unknown."""
        return self[client.version] if client.version in self._packed else None

    def record(self, client: ClientInfo, version: int) -> ArrayRecord:
        """Return what gives a client a mask, encoded once for all that hold the same.

        The client holds it then.
        """
        held = self.held_by(client)
        key = version, held.version if held else 0
        if key not in self._records:
            self._records[key] = raw_record(self.coding.encode(self[version], held))
        client.version = version
        return self._records[key]

    def expire(self, clients: Iterable[ClientInfo]) -> None:
        """Forget masks that neither clients nor the server refer to."""
        used = {client.version for client in clients} | set(self.own.values())
        used |= {FIRST, self.current}
        self._packed = {v: bits for v, bits in self._packed.items() if v in used}
        self._unpacked = {
            v: mask for v, mask in self._unpacked.items() if v == self.current
        }
        self._records = {}

    # --- state ------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """Return the masks by version, eight weights a byte."""
        return {str(v): torch.from_numpy(bits) for v, bits in self._packed.items()}

    def facts(self) -> dict[str, Any]:
        """Return which versions there are, and whose they are."""
        own = [[client, version] for client, version in self.own.items()]
        return {"current": self.current, "newest": self.newest, "own": own}

    @classmethod
    def restored(
        cls, coding: MaskCoding, tensors: Tensors, facts: dict[str, Any]
    ) -> "Masks":
        """Return masks from what `tensors` and `facts` returned."""
        packed = {int(v): bits.cpu().numpy().copy() for v, bits in tensors.items()}
        own = dict(facts["own"])
        return cls(coding, facts["current"], facts["newest"], own, packed)
