"""Partition ``dirichlet_equal``: equally many samples, a mix of classes each."""

import numpy as np
import torch

# Below it a mix is one class whatever the concentration; its inverse is still finite.
SMALLEST = 1e-300


def deal(
    labels: torch.Tensor, clients: int, alpha: float, generator: np.random.Generator
) -> list[torch.Tensor]:
    """Divide samples into parts of equal size, each of its own mix of classes.

    The mix of a client is drawn from a symmetric Dirichlet distribution, and from the
    mix the classes of its samples. A class without samples left is drawn no more, and
    the mixes are renormalised over the others. If clients want more of a class than
    there is left, each of the wanted samples is as likely to be given as any other: no
    client comes last.

    Parameters
    ----------
    labels : torch.Tensor
        int64, shape (n,); samples of a class are dealt in this order.
    clients : int
        Number of clients, at most n.
    alpha : float
        Concentration of the Dirichlet distribution, greater than 0.
    generator : numpy.random.Generator
        The only source of randomness.

    Returns
    -------
    list[torch.Tensor]
        The ascending int64 positions in ``labels`` of each client's samples; disjoint,
        complete. Their numbers differ by at most one.
    """
    counts = labels.unique(return_counts=True)[1].numpy()
    fewest, more = divmod(len(labels), clients)
    sizes = np.full(clients, fewest)
    sizes[:more] += 1
    mixes = draw_mixes(clients, len(counts), alpha, generator)
    given = draw_counts(mixes, sizes, counts, generator)
    numbers = np.tile(np.arange(clients), len(counts))
    owners = torch.empty_like(labels)
    owners[labels.argsort(stable=True)] = torch.from_numpy(
        numbers.repeat(given.T.ravel())
    )
    return list(owners.argsort(stable=True).split(sizes.tolist()))


def draw_mixes(
    clients: int, classes: int, alpha: float, generator: np.random.Generator
) -> np.ndarray:
    """Draw logarithms of the shares of a symmetric Dirichlet distribution.

    They are the logarithms of independent gamma variates of shape ``alpha``. Among few
    classes that are left, shares too small for floating point may be the largest.

    Parameters
    ----------
    clients, classes : int
        Number of mixes, and of the classes in each.
    alpha : float
        Concentration, greater than 0.
    generator : numpy.random.Generator
        The only source of randomness.

    Returns
    -------
    numpy.ndarray
        float64, shape (clients, classes); shares are proportional to the exponentials.
    """
    shape, alpha = (clients, classes), max(alpha, SMALLEST)
    # A variate of shape a is one of shape a + 1 times u ** (1 / a), u uniform.
    larger = np.log(generator.gamma(alpha + 1, size=shape))
    return larger + np.log(1 - generator.random(shape)) / alpha


def draw_counts(
    mixes: np.ndarray,
    sizes: np.ndarray,
    counts: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """Draw how many samples of each class a client gets, see `deal`.

    Parameters
    ----------
    mixes : numpy.ndarray
        float64, shape (clients, classes), see `draw_mixes`.
    sizes : numpy.ndarray
        int64, shape (clients,): samples of each client.
    counts : numpy.ndarray
        int64, shape (classes,): samples of each class; the sum is that of ``sizes``.
    generator : numpy.random.Generator
        The only source of randomness.

    Returns
    -------
    numpy.ndarray
        int64, shape (clients, classes), with the sums ``sizes`` and ``counts``.
    """
    given = np.zeros(mixes.shape, dtype=np.int64)
    wanted, left = sizes.copy(), counts.copy()
    # Every pass uses up a class, or is the last.
    while len(rows := wanted.nonzero()[0]):
        open_mixes = np.where(left > 0, mixes[rows], -np.inf)
        shares = np.exp(open_mixes - open_mixes.max(axis=1)[:, None])
        shares /= shares.sum(axis=1)[:, None]
        drawn = generator.multinomial(wanted[rows], shares)
        for number in (drawn.sum(axis=0) > left).nonzero()[0]:
            drawn[:, number] = generator.multivariate_hypergeometric(
                drawn[:, number], left[number]
            )
        given[rows] += drawn
        wanted[rows] -= drawn.sum(axis=1)
        left -= drawn.sum(axis=0)
    return given
