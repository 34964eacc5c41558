"""FedProx (Li et al., 2020): local steps are drawn back to the model of the round."""

from functools import partial

from pydantic import Field

from masksl.methods import METHODS, Method
from masksl.methods.client import ClientMethod
from masksl.methods.fedavg import FedAvgConfig
from masksl.methods.fedavg import client as fedavg


class FedProxConfig(FedAvgConfig):
    """The keys of federated averaging, and the weight of the proximal term."""

    name: str = Field("fedprox", description="fedprox")
    mu: float = Field(0.01, ge=0, description="a number from 0 on")


def draw_back(client, tensors, start, gradients):
    """Add the gradient of mu / 2 times the squared distance from the start."""
    for name, gradient in gradients.items():
        gradient.add_(tensors[name] - start[name], alpha=client.setup.config.mu)


TRAIN = {fedavg.TRAIN: partial(fedavg.train, correct=draw_back)}
CLIENT = ClientMethod(fedavg.CLIENT.module, {**fedavg.CLIENT.handlers, **TRAIN})
SERVER = "masksl.methods.fedavg.server:FedAvgServer"
METHODS["fedprox"] = Method(FedProxConfig, SERVER, f"{__name__}:CLIENT")
