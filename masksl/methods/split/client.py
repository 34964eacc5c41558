"""The client side of split learning."""

import math
from dataclasses import dataclass, field

import torch
from flwr.app import RecordDict
from torch import nn

from masksl import model
from masksl.compress import decode, kept_positions
from masksl.dataset import DATASETS
from masksl.methods.client import Client, ClientMethod, Place, place_of
from masksl.methods.split import SplitConfig
from masksl.methods.split.client_half import SteppedHalf, half_of, own_state
from masksl.methods.split.messages import (
    ACTIVATION,
    BACKWARD,
    COLLECT,
    ERROR,
    EVALUATE,
    EXACT_GRADIENT,
    FORWARD,
    GRADIENT,
    LABEL,
    MEASURE,
    WEIGHT_ERROR,
    label_record,
)
from masksl.runtime import messages
from masksl.settings import Settings, parse
from masksl.training.network import LocalNetwork

_SENT = "sent"  # record of the frame whose positions its gradient is sent at


@dataclass
class GraphCache:
    """Networks between forward and backward, with their graphs.

    A client whose graph is not here rebuilds it from its state. Graphs of other runs
    and of earlier rounds are dropped. The graph of a client that failed stays for the
    rest of its round, as long as there is room.

    Attributes
    ----------
    networks : dict[int, tuple[Place, LocalNetwork]]
        Place and network by client.
    """

    run_id: int = 0
    networks: dict[int, tuple[Place, LocalNetwork]] = field(default_factory=dict)

    def put(
        self, run_id: int, client: int, place: Place, network: LocalNetwork, most: float
    ) -> None:
        """Keep a network if there is room for it.

        Parameters
        ----------
        run_id : int
            Flower's id of the run.
        client : int
            Partition of the client.
        place : Place
            Round and step.
        network : LocalNetwork
            Network that holds the graph.
        most : float
            Number of networks to keep at most.
        """
        self.networks = {
            number: entry
            for number, entry in self.networks.items()
            if self.run_id == run_id and entry[0].round == place.round
        }
        self.run_id = run_id
        self.networks.pop(client, None)
        if len(self.networks) >= most:  # graphs of clients that failed meanwhile
            self.networks = {n: e for n, e in self.networks.items() if e[0] == place}
        if len(self.networks) < most:
            self.networks[client] = place, network

    def take(self, run_id: int, client: int, place: Place) -> LocalNetwork | None:
        """Remove and return the network of a step, None if it is not here."""
        at, network = self.networks.get(client, (None, None))
        if self.run_id != run_id or at != place:
            return None
        del self.networks[client]
        return network


GRAPHS = GraphCache()
"""Graphs of the clients of this process."""


def forward(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.forward`: the activation of the next mini-batch."""
    place, half = place_of(content), half_of(client)
    half.receive(content)
    with client.watch("compute"):
        network = half.network()
        activation, labels = run_forward(client, network, place)
    run_id = client.context.run_id
    GRAPHS.put(run_id, client.number, place, network, _graphs_kept(client))
    with client.watch("codec"):
        frame = client.setup.compressor.encode(
            activation, seed=client.seed("compress", place), training=True
        )
    if _config(client).gradient_positions == "kept":
        client.context.state[_SENT] = messages.frame_record(frame)
    reply = _activation_reply(client, frame, labels)
    more = {}
    if place.step == 0:
        half.joins(reply)
        count = activation.numel()
        decoded = decode(frame, device=activation.device, max_elements=count)
        more["relative_error"] = relative_error(activation, decoded)
    reply[messages.METRICS] = client.metrics(**more)
    return reply


def backward(client: Client, content: RecordDict) -> RecordDict:
    """Answer `train.backward`: back-propagate, then step or send gradients up."""
    place, half = place_of(content), half_of(client)
    network = GRAPHS.take(client.context.run_id, client.number, place)
    rebuilt = network is None
    if network is None:
        with client.watch("compute"):
            network = half.network()
            run_forward(client, network, place)
    with client.watch("codec"):
        gradient, positions = _received(client, content, network.output_shape)
    with client.watch("compute"):
        gradients = network.backward(gradient, positions)
    reply = half.trained(network, gradients, content)
    reply[messages.METRICS] = client.metrics(rebuilt=int(rebuilt))
    return reply


def measure(client: Client, content: RecordDict) -> RecordDict:
    """Answer `query.gradient`: what the coding of a gradient changes.

    The gradient as it will be sent and the exact one go through the half of the same
    step. Nothing is stepped or remembered.
    """
    place, half = place_of(content), half_of(client)
    given: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    for kind in (EXACT_GRADIENT, GRADIENT):
        network = half.network()
        run_forward(client, network, place)
        shape = network.output_shape
        if kind == GRADIENT:
            gradient, positions = _received(client, content, shape)
        else:
            frame, positions = messages.frame_of(content, kind), None
            device, count = client.setup.device, shape.numel()
            gradient = decode(frame, device=device, max_elements=count)
        own = network.backward(gradient, positions)
        weights.append(torch.cat([tensor.reshape(-1) for tensor in own.values()]))
        if positions is not None:
            values, gradient = gradient, torch.zeros(shape, device=gradient.device)
            gradient.view(-1)[positions] = values
        given.append(gradient)
    errors = {
        ERROR: relative_error(given[0], given[1]),
        WEIGHT_ERROR: relative_error(weights[0], weights[1]),
    }
    return RecordDict({messages.METRICS: client.metrics(**errors)})


def evaluate(client: Client, content: RecordDict) -> RecordDict:
    """Answer `evaluate.forward`: the activation of a batch of test images."""
    place, half = place_of(content), half_of(client)
    half.receive(content)
    with client.watch("compute"):
        images, labels = client.test_batch(place.step)
        activation = half.network(evaluated=True).evaluate(images)
    with client.watch("codec"):
        frame = client.setup.compressor.encode(
            activation, seed=client.seed("compress.test", place), training=False
        )
    reply = _activation_reply(client, frame, labels)
    reply[messages.METRICS] = client.metrics()
    return reply


def send_buffers(client: Client, content: RecordDict) -> RecordDict:
    """Answer `evaluate.buffers`: the buffers of the client's half."""
    del content
    half = half_of(client)
    assert isinstance(half, SteppedHalf)
    reply = half.send_buffers()
    reply[messages.METRICS] = client.metrics()
    return reply


def run_forward(
    client: Client, network: LocalNetwork, place: Place
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the activation and the labels of a step."""
    images, labels = client.train_batch(place)
    seed = client.seed("dropout.client", place)
    return network.forward(images, seed=seed), labels


def relative_error(tensor: torch.Tensor, decoded: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the tensor, 0 for zeros."""
    norm = float(tensor.double().norm())
    return float((decoded.double() - tensor.double()).norm()) / norm if norm else 0.0


def client_half(settings: Settings, units: model.Units) -> nn.Module:
    """Return the units before the cut."""
    name, cut = str(settings["model.name"]), settings["cut"]
    units_kept = model.resolve_cut(name, cut)  # type: ignore[arg-type]
    return model.split(units, units_kept)[0]


HANDLERS = {
    FORWARD: forward,
    BACKWARD: backward,
    EVALUATE: evaluate,
    COLLECT: send_buffers,
    MEASURE: measure,
}

CLIENT = ClientMethod(client_half, HANDLERS, own_state)


def _config(client: Client) -> SplitConfig:
    config = client.setup.config
    assert isinstance(config, SplitConfig)
    return config


def _graphs_kept(client: Client) -> float:
    """Return how many graphs a process keeps at most."""
    value = client.setup.settings.get("engine.clients_in_flight", "null")
    return parse(value, int | None) or math.inf


def _received(
    client: Client, content: RecordDict, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradient of a message and its positions, None if it has all.

    Parameters
    ----------
    client : Client
        The client.
    content : RecordDict
        Content of the message.
    shape : torch.Size
        Shape of the activation.
    """
    positions = _gradient_positions(client, shape.numel())
    count = shape.numel() if positions is None else positions.numel()
    frame = messages.frame_of(content, GRADIENT)
    gradient = decode(frame, device=client.setup.device, max_elements=count)
    if positions is None and gradient.shape == (*shape[:2], 1, 1):
        gradient = gradient.expand(shape)  # one element of each map was sent
    return gradient, positions


def _gradient_positions(client: Client, elements: int) -> torch.Tensor | None:
    """Return the positions that its gradient is sent at, None if all.

    Parameters
    ----------
    client : Client
        The client.
    elements : int
        Number of elements of its activation.
    """
    if _config(client).gradient_positions == "all":
        return None
    frame = messages.frame_of(client.context.state, _SENT)
    device = client.setup.device
    return kept_positions(frame, device=device, max_elements=elements)


def _activation_reply(client: Client, frame: bytes, labels: torch.Tensor) -> RecordDict:
    classes = DATASETS[client.setup.dataset.name].classes
    return RecordDict(
        {
            ACTIVATION: messages.frame_record(frame),
            LABEL: label_record(labels, classes),
        }
    )
