"""Scoring a whole network at the server."""

import torch
from torch import nn

from masksl import dataset
from masksl.dataset import DatasetConfig, DatasetError
from masksl.runtime.messages import RunError
from masksl.runtime.round import Round
from masksl.settings import RunConfig, Settings, ThreadsConfig, read
from masksl.training.compute import ComputeConfig
from masksl.training.network import LocalNetwork
from masksl.training.score import Score, score
from masksl.training.tensors import Tensors


def score_test_set(
    round_: Round, settings: Settings, module: nn.Module, tensors: Tensors
) -> Score:
    """Score the whole test set, which sends nothing.

    Parameters
    ----------
    round_ : Round
        The current round; its watch counts the time as the server's.
    settings : Settings
        Configuration of the run.
    module : nn.Module
        The network, on the device of the server.
    tensors : dict[str, torch.Tensor]
        Its parameters and buffers by name. They do not change.

    Raises
    ------
    RunError
        If the data set cannot be read.
    """
    own = {name: tensor.detach() for name, tensor in tensors.items()}
    device = str(next(iter(own.values())).device)
    threads = read(ThreadsConfig, settings, "threads").server
    compute = read(ComputeConfig, settings, "compute")
    with round_.watch("server"):
        try:
            data = dataset.load(read(DatasetConfig, settings, "dataset"), device)
            network = LocalNetwork(module, own, {}, threads, compute)
            every, total = torch.arange(len(data.test.labels)), Score()
            for indices in every.split(RunConfig.of(settings).eval_batch_size):
                images, labels = data.test_batch(indices)
                total += score(network.evaluate(images), labels)
        except DatasetError as error:
            place = f"round {round_.number}, evaluation"
            raise RunError(f"{place}: {error}") from error
    return total
