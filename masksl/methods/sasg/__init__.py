"""SASG: in every iteration each worker uploads a gradient, or nothing."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from masksl.settings import Section, Value

_DOWN = ("auto", "dense", "sum", "relay")
_Lag = Annotated[float, Field(ge=0, le=1e6)] | Literal["step"]


class SasgConfig(Section):
    """Configuration of SASG, LASG, sparse SGD with error feedback, and SGD.

    Parameters
    ----------
    name : str
        ``sasg``.
    upload : str
        ``sparse``: gradients go through ``compressor``, and each worker remembers what
        it lost; ``dense``: they are sent as they are.
    adaptive : bool
        Whether a worker whose gradient has changed little sends nothing; the server
        then applies its last upload again.
    constant : float
        Factor of the threshold of that change; 0 switches the rule off.
    delay : int
        Iterations at the beginning in which everybody uploads, and the number of
        skipped iterations, counted from the last upload on, after which a worker
        uploads again.
    history : int
        Steps of the model that the threshold is a sum over.
    threshold_lag : float | str
        Rounds by which the threshold's learning rate is behind that of the update; or
        ``step``: each step of the model is divided by the rate that it was made with.
    down : str
        What comes down in every iteration: ``dense``, the model; ``sum``, the sum of
        all workers' last uploads; ``relay``, the other workers' new uploads as they
        came; ``auto``: ``relay`` if uploads are sparse, else ``dense``.
    target_metric : str
        Which accuracy ``target`` is about, ``top1`` or ``top5``.
    """

    unused_slots: ClassVar[tuple[str, ...]] = (
        "gradient_compressor",
        "model_compressor",
    )
    fixed: ClassVar[Mapping[str, tuple[Value, str]]] = {
        "fraction": (1.0, "every worker takes part in every step"),
        "optimizer.name": ("sgd", "uploads are gradients times the rate"),
        "optimizer.momentum": (0.0, "uploads are gradients times the rate"),
        "optimizer.weight_decay": (0.0, "uploads are gradients times the rate"),
    }

    name: str = Field("sasg", description="sasg")
    upload: Literal["sparse", "dense"] = Field(
        "sparse", description="one of sparse, dense"
    )
    adaptive: bool = Field(True, description="true or false")
    constant: float = Field(0.5, ge=0, le=1e30, description="a number from 0 to 1e30")
    delay: int = Field(
        10, ge=1, le=1_000_000, description="a whole number from 1 to 1000000"
    )
    history: int = Field(
        9, ge=1, le=1_000_000, description="a whole number from 1 to 1000000"
    )
    threshold_lag: _Lag = Field(1.0, description="step or a number from 0 to 1e6")
    down: Literal[_DOWN] = Field(  # type: ignore[valid-type]
        "auto", description=f"one of {', '.join(_DOWN)}"
    )
    target_metric: Literal["top1", "top5"] = Field(
        "top1", description="one of top1, top5"
    )

    @field_validator("down")
    @classmethod
    def _needs_sparse(cls, down: str, info: ValidationInfo) -> str:
        if down in ("sum", "relay") and info.data.get("upload") == "dense":
            raise PydanticCustomError("allowed", "auto or dense with upload=dense")
        return down

    @property
    def is_sparse(self) -> bool:
        """Whether uploads go through the compressor."""
        return self.upload == "sparse"

    @property
    def rule(self) -> bool:
        """Whether workers may skip an upload."""
        return self.adaptive and self.constant > 0

    @property
    def way_down(self) -> str:
        """What comes down: ``dense``, ``sum`` or ``relay``."""
        if self.down == "auto":
            return "relay" if self.is_sparse else "dense"
        return self.down
