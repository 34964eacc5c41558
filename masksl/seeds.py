"""A generator for every purpose: nothing here or elsewhere draws from a global one."""

import hashlib

import torch


# pylint: disable=redefined-builtin
def derive(
    seed: int, purpose: str, *, client: int = 0, round: int = 0, step: int = 0
) -> int:
    """Return the seed of one purpose at one place of a run.

    Parameters
    ----------
    seed : int
        Seed of the run.
    purpose : str
        What is drawn, e.g. ``shuffle``.
    client : int
        Partition of the client, where it matters.
    round : int
        Round, where it matters.
    step : int
        Step within the round, where it matters.

    Returns
    -------
    int
        63 bits, as good as independent of those of any other arguments.
    """
    text = f"{seed}/{purpose}/{client}/{round}/{step}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(
    seed: int, purpose: str, *, client: int = 0, round: int = 0, step: int = 0
) -> torch.Generator:
    """Return a CPU generator seeded by `derive`, which has the parameters."""
    derived = derive(seed, purpose, client=client, round=round, step=step)
    return torch.Generator().manual_seed(derived)
