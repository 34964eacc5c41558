"""FLASH: sparse federated training, with one mask for all clients or one for each."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from masksl.settings import Section

VARIANTS = ("dense", "nst", "pdst", "spdst", "jmwst")
_MASKS = ("auto", "given", "full", "packed")
_Share = Annotated[float, Field(gt=0, le=1)]
_SHARE = "a number greater than 0 and at most 1"
_SHARES = "a list of ascending numbers greater than 0 and at most 1, the last one 1"


class FlashConfig(Section):
    """Configuration of FLASH and of what it is compared with.

    Parameters
    ----------
    name : str
        ``flash``.
    variant : str
        ``dense``, no mask; ``nst``, each client has a mask of its own, which evolves;
        ``pdst``, one random mask, each layer of the same density; ``spdst``, one random
        mask, with densities of layers from a first stage; ``jmwst``, such a mask, which
        evolves at the clients and is made anew by the server.
    density : float
        Share of the maskable weights that a client has.
    local_epochs : int
        Passes of a client over its data in a round.
    warmup : str
        Who finds the densities of the layers: ``clients``, in the first round before
        the others; or ``init``, the server, from its initial weights alone.
    warmup_epochs : int
        Passes of the first stage.
    warmup_fraction : float
        Share of the clients that take part in the first stage, at least one.
    prune_rate : float
        Share of a layer's weights that is cut at the start of a participation; it falls
        to zero at its end.
    anneal : bool
        Whether that share falls from round to round, too, along a half cosine.
    interval : int
        ``jmwst``: in which rounds the mask changes: the first and every so many.
    rebuild : str
        ``jmwst``: what the density of a layer follows, ``avg``, the mean of the
        clients' masks; or ``aggregate``, the averaged weights.
    aggregate : str
        ``fedavg``: a weight is averaged over all clients, and is 0 where it is masked;
        ``fma``: over those clients that have it.
    hetero : tuple[float, ...]
        Densities of groups of clients, over ``density``; empty without groups. From
        the second round on, each group but the last has the largest weights alone.
    hetero_ends : tuple[float, ...]
        Where each group ends among the clients of a round, as a share of them.
    scale_init : bool
        Whether initial weights are divided by the root of their layer's density.
    mask_first : bool
        Whether the first layer has a mask.
    mask_shortcuts : bool
        Whether convolutions of 1x1 have a mask.
    softmax : bool
        Whether a softmax stands before the loss, which has one of its own, as in the
        network of the authors for MNIST.
    rest : str
        What biases and normalisation travel in, ``float32`` or ``bfloat16``.
    feedback : bool
        Whether a client adds to an update what the one before lost by ``compressor``.
    masks : str
        How a mask is coded: ``auto``, the smallest way; ``given``, by the one that it
        came about from; ``full``, by the densities of layers alone; ``packed``, a bit a
        weight. It changes no mask.
    """

    unused_slots: ClassVar[tuple[str, ...]] = ("gradient_compressor",)

    name: str = Field("flash", description="flash")
    variant: Literal[VARIANTS] = Field(  # type: ignore[valid-type]
        "spdst", description=f"one of {', '.join(VARIANTS)}"
    )
    density: float = Field(0.05, gt=0, le=1, description=_SHARE)
    local_epochs: int = Field(1, ge=1, description="a whole number from 1 on")
    warmup: Literal["clients", "init"] = Field(
        "clients", description="one of clients, init"
    )
    warmup_epochs: int = Field(5, ge=1, description="a whole number from 1 on")
    warmup_fraction: float = Field(0.25, gt=0, le=1, description=_SHARE)
    prune_rate: float = Field(
        0.25, ge=0, lt=1, description="a number from 0 to less than 1"
    )
    anneal: bool = Field(False, description="true or false")
    interval: int = Field(
        1, ge=1, le=1_000_000, description="a whole number from 1 to 1000000"
    )
    rebuild: Literal["avg", "aggregate"] = Field(
        "avg", description="one of avg, aggregate"
    )
    aggregate: Literal["fedavg", "fma"] = Field(
        "fedavg", description="one of fedavg, fma"
    )
    hetero: tuple[_Share, ...] = Field((), description=f"empty, or {_SHARES}")
    hetero_ends: tuple[_Share, ...] = Field((), description=f"empty, or {_SHARES}")
    scale_init: bool = Field(False, description="true or false")
    mask_first: bool = Field(True, description="true or false")
    mask_shortcuts: bool = Field(True, description="true or false")
    softmax: bool = Field(False, description="true or false")
    rest: Literal["float32", "bfloat16"] = Field(
        "float32", description="one of float32, bfloat16"
    )
    feedback: bool = Field(False, description="true or false")
    masks: Literal[_MASKS] = Field(  # type: ignore[valid-type]
        "auto", description=f"one of {', '.join(_MASKS)}"
    )

    @field_validator("hetero", "hetero_ends")
    @classmethod
    def _ascend(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if shares and (list(shares) != sorted(set(shares)) or shares[-1] != 1):
            raise ValueError("not ascending to 1")
        return shares

    @field_validator("hetero")
    @classmethod
    def _has_one_mask(
        cls, shares: tuple[float, ...], info: ValidationInfo
    ) -> tuple[float, ...]:
        variant, rebuild = info.data.get("variant"), info.data.get("rebuild")
        if shares and variant not in ("spdst", "jmwst"):
            raise PydanticCustomError("allowed", "[] unless variant is spdst or jmwst")
        if shares and variant == "jmwst" and rebuild != "aggregate":
            raise PydanticCustomError("allowed", "[] unless rebuild is aggregate")
        return shares

    @field_validator("hetero_ends")
    @classmethod
    def _has_an_end_for_each(
        cls, ends: tuple[float, ...], info: ValidationInfo
    ) -> tuple[float, ...]:
        groups = len(info.data.get("hetero", ()))
        if len(ends) != groups:
            number = f"{groups} of them" if groups else "[]"
            raise PydanticCustomError("allowed", f"{_SHARES}: {number}, as in hetero")
        return ends

    @property
    def has_masks(self) -> bool:
        """Whether clients hold a part of the weights."""
        return self.variant != "dense"

    @property
    def has_warmup(self) -> bool:
        """Whether a first stage finds the densities of the layers."""
        return self.variant in ("spdst", "jmwst")

    def evolves(self, round_: int) -> bool:
        """Return whether masks change in a round, from 1 on."""
        if self.variant == "jmwst":
            return (round_ - 1) % self.interval == 0
        return self.variant == "nst"

    @property
    def depends_on_rounds(self) -> bool:
        """Whether a round depends on the number of all rounds."""
        return self.anneal and self.variant in ("nst", "jmwst")

    def prune_rate_in(self, round_: int, rounds: int) -> float:
        """Return the share of weights that is cut in a round, from 1 on, of all."""
        if not self.evolves(round_):
            return 0.0
        if not self.anneal:
            return self.prune_rate
        return self.prune_rate * (1 + math.cos(math.pi * (round_ - 1) / rounds)) / 2
