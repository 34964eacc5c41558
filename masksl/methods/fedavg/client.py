"""The client side of federated averaging."""

from collections.abc import Callable
from functools import partial

from flwr.app import RecordDict
from torch import nn

from masksl.compress import encode_set
from masksl.methods.client import MODEL, Client, ClientMethod, place_of
from masksl.methods.fedavg import FedAvgConfig
from masksl.methods.fedavg.messages import (
    EVALUATE,
    SCORE,
    TRAIN,
    UPDATE,
    score_record,
)
from masksl.methods.local import run_epochs
from masksl.runtime import messages
from masksl.runtime.compressors import EXACT
from masksl.training.network import LocalNetwork
from masksl.training.score import Score, score
from masksl.training.tensors import Tensors, copies

Correct = Callable[[Client, Tensors, Tensors, Tensors], None]


def train(
    client: Client, content: RecordDict, correct: Correct | None = None
) -> RecordDict:
    """Answer `train.local`: train, then send the new model or the difference.

    Parameters
    ----------
    client : Client
        The client.
    content : RecordDict
        Content of the message.
    correct : Callable[[Client, Tensors, Tensors, Tensors], None] | None
        Of a method that differs from federated averaging in its local gradients alone:
        changes them in place before every local step, given the client, the tensors of
        its network, those that the round began with, and the gradients.
    """
    place, rounds = place_of(content), int(messages.place_of(content)["rounds"])
    client.receive(content, shared=True)
    start = _model(client)
    with client.watch("compute"):
        network = _network(client, copies(start))
        own = correct and partial(correct, client, network.tensors, start)
        rates = client.setup.rates(place.round, rounds)
        epochs = _config(client).local_epochs
        loss, samples = run_epochs(client, network, epochs, rates, correct=own)
    client.state.pop(MODEL, None)  # the next message brings a new one
    reply = RecordDict()
    with client.watch("codec"):
        if client.setup.compressor == EXACT:
            reply[messages.MODEL] = messages.model_record(network.tensors)
        else:
            update = difference(network, start)
            data = encode_set(
                update,
                client.setup.compressor,
                exact=network.buffers.keys(),
                seed=client.seed("compress", place),
            )
            dense = messages.dense_bytes(update)
            reply[UPDATE] = messages.set_record(data, dense)
    reply[messages.METRICS] = client.metrics(loss=loss, samples=samples)
    return reply


def difference(network: LocalNetwork, start: Tensors) -> Tensors:
    """Return how parameters have changed since the start, and buffers as they are."""
    buffers = network.buffers
    return {
        name: tensor.detach() if name in buffers else tensor.detach() - start[name]
        for name, tensor in network.tensors.items()
    }


def evaluate(client: Client, content: RecordDict) -> RecordDict:
    """Answer `evaluate.local`: the score of the client's shard of the test set."""
    client.receive(content, shared=True)
    with client.watch("compute"):
        network = _network(client, _model(client))
        total, size = Score(), client.run.eval_batch_size
        for step in range(-(-len(client.test_part()) // size)):
            images, labels = client.test_batch(step)
            total += score(network.evaluate(images), labels)
    reply = RecordDict({SCORE: score_record(total)})
    reply[messages.METRICS] = client.metrics()
    return reply


CLIENT = ClientMethod(
    lambda settings, units: nn.Sequential(*units),
    {TRAIN: train, EVALUATE: evaluate},
)


def _config(client: Client) -> FedAvgConfig:
    config = client.setup.config
    assert isinstance(config, FedAvgConfig)
    return config


def _model(client: Client) -> Tensors:
    """Return the model that the client has, which other clients may share."""
    state = client.state
    return state[MODEL] if MODEL in state else client.setup.initial


def _network(client: Client, tensors: Tensors) -> LocalNetwork:
    """Return a network whose optimiser starts anew."""
    setup = client.setup
    own = {name: tensor.detach() for name, tensor in tensors.items()}
    return LocalNetwork(setup.module, own, {}, setup.threads, setup.compute)
