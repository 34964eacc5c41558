"""Non-IID partition of FedPM's public code: chunks of consecutive classes."""

import torch

SHARES = 10, 100  # shares of clients are drawn from 10 to 99


def deal(
    labels: torch.Tensor,
    clients: int,
    classes_per_client: int,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """Divide samples into chunks of consecutive classes and deal them to clients.

    Each client takes chunks of ``size // classes_per_client`` samples, at least one,
    from the classes that follow a random one cyclically, until it has ``size`` samples
    (`draw_sizes`). Classes without samples left are skipped. A client may thus have
    more classes than ``classes_per_client``, the last ones also fewer. See
    ``split_image_data`` of the public code of FedPM (Isik et al., 2023).

    Parameters
    ----------
    labels : torch.Tensor
        int64, shape (n,); samples of a class are dealt in this order.
    clients : int
        Number of clients, at most n.
    classes_per_client : int
        Number of chunks of a client, apart from what a division leaves over.
    generator : torch.Generator
        On the CPU; the only source of randomness.

    Returns
    -------
    list[torch.Tensor]
        The ascending int64 positions in ``labels`` of each client's samples; disjoint,
        complete, none empty.

    Raises
    ------
    ValueError
        If there are fewer classes than ``classes_per_client``.
    """
    counts = labels.unique(return_counts=True)[1].tolist()
    if classes_per_client > len(counts):
        raise ValueError(
            f"dataset.classes_per_client={classes_per_client}: must be at most "
            f"{len(counts)}, the classes of the training samples"
        )
    left = list(labels.argsort(stable=True).split(counts))  # positions by class
    sizes = draw_sizes(len(labels), clients, generator)
    starts = torch.randint(len(counts), (clients,), generator=generator).tolist()
    parts = []
    for size, number in zip(sizes, starts, strict=True):
        chunk = max(1, size // classes_per_client)
        taken = []
        while size > 0:
            some = left[number][: min(chunk, size)]
            left[number] = left[number][len(some) :]
            taken.append(some)
            size -= len(some)
            number = (number + 1) % len(counts)
        parts.append(torch.cat(taken).sort().values)
    return parts


def draw_sizes(samples: int, clients: int, generator: torch.Generator) -> list[int]:
    """Draw the number of samples of each client.

    Every client gets one sample. The rest is divided in proportion to whole numbers
    drawn uniformly from 10 to 99, rounded so that nothing is left over.

    Parameters
    ----------
    samples : int
        Number of samples, at least ``clients``.
    clients : int
        Number of clients.
    generator : torch.Generator
        On the CPU; the only source of randomness.

    Returns
    -------
    list[int]
        Positive sizes whose sum is ``samples``.
    """
    ends = torch.randint(*SHARES, (clients,), generator=generator).cumsum(0)
    ends = ends * (samples - clients) // ends[-1]
    return list((1 + ends.diff(prepend=ends.new_zeros(1))).tolist())
