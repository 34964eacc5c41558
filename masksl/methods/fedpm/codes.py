"""What client and server compute alike: the start, and what a mask is coded by."""

import numpy as np
import torch
import xxhash
from torch import nn

from masksl.methods.fedpm import FedPmConfig
from masksl.methods.fedpm.ballot import Rule
from masksl.methods.fedpm.dither import bins, numbers
from masksl.methods.fedpm.frozen import Frozen
from masksl.methods.fedpm.theta import Theta
from masksl.utils import derive_seed


def start(
    module: nn.Module, config: FedPmConfig, seed: int
) -> tuple[Frozen, Rule, Theta]:
    """Return what a run begins with, from its seed.

    Parameters
    ----------
    module : nn.Module
        The network; its weights do not matter.
    config : FedPmConfig
        Configuration of the method.
    seed : int
        Seed of the run.

    Returns
    -------
    tuple[Frozen, Rule, Theta]
        The frozen weights, the rule of the votes, and the first probabilities.

    Raises
    ------
    NetworkError
        If the network has layers that are not supported.
    """
    frozen = Frozen.of(module, config.constant, derive_seed(seed, "fedpm.signs"))
    rule = Rule(config, derive_seed(seed, "fedpm.dither"))
    scores = derive_seed(seed, "fedpm.start")
    return frozen, rule, Theta.initial(frozen.elements, scores, config.start)


def digest(frozen: Frozen, theta: Theta) -> bytes:
    """Return 64 bits by which the two sides compare weights and probabilities."""
    voters = theta.voters.to_bytes(4, "little")
    return xxhash.xxh3_64_digest(frozen.digest + voters + theta.index.tobytes())


def reference_of(
    rule: Rule, frozen: Frozen, theta: Theta, round_: int, client: int
) -> torch.Tensor | None:
    """Return the reference of a mask.

    Parameters
    ----------
    rule : Rule
        Rule of the run; ``method.code`` says which.
    frozen : Frozen
        The frozen weights.
    theta : Theta
        The probabilities that the round began with.
    round_, client : int
        The round, and the client that sends the mask.

    Returns
    -------
    torch.Tensor | None
        Whole numbers, shape (d,); None if all bits share one probability.
    """
    match rule.config.code:
        case "layer":
            return frozen.layers
        case "theta":
            return torch.from_numpy(theta.levels)
        case "dither":
            drawn = numbers(rule.seed, round_, client, frozen.elements)
            return torch.from_numpy(bins(drawn, theta.thresholds))
    return None


def formula(mask: np.ndarray) -> float:
    """Return the bits a weight that the paper's authors count for a mask.

    It is the entropy of the share of ones, smoothed, and log2(d) / d.

    Parameters
    ----------
    mask : numpy.ndarray
        uint8, shape (d,): zeros and ones.
    """
    share = float(mask.mean())
    smoothed = 0.99 * share + 0.01 * (1 - share)
    probabilities = np.array([smoothed, 1 - smoothed])
    entropy = -float((probabilities * np.log2(probabilities)).sum())
    return entropy + float(np.log2(len(mask))) / len(mask)
