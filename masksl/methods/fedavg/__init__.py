"""Federated averaging: models go both ways, once a round."""

from typing import ClassVar, Literal

from pydantic import Field

from masksl.settings import Section


class FedAvgConfig(Section):
    """Configuration of federated averaging.

    Parameters
    ----------
    name : str
        ``fedavg``.
    local_epochs : int
        Passes of a client over its data in a round.
    server_lr : float
        How far the server goes from its model towards the average: 1 replaces it. With
        ``majority`` how far each parameter goes.
    aggregate : str
        ``mean``: models are averaged by samples; ``majority``: each parameter goes as
        most clients' do, up or down, each with one vote.
    evaluate : str
        Who scores the test set: ``server``, all of it, which sends nothing; or
        ``clients``, each its shard.
    """

    unused_slots: ClassVar[tuple[str, ...]] = ("gradient_compressor",)

    name: str = Field("fedavg", description="fedavg")
    local_epochs: int = Field(1, ge=1, description="a whole number from 1 on")
    server_lr: float = Field(
        1.0, gt=0, le=1e30, description="a number greater than 0 and at most 1e30"
    )
    aggregate: Literal["mean", "majority"] = Field(
        "mean", description="one of mean, majority"
    )
    evaluate: Literal["server", "clients"] = Field(
        "server", description="one of server, clients"
    )
