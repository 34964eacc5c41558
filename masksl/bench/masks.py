"""Coding of FedPM's masks and votes: bits a weight, and CPU seconds each way.

The network is conv6 for CIFAR-10, 2,262,602 weights. Probabilities are those after five
rounds of ten clients whose masks were drawn without training; local training is a
normal change of the scores.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from masksl import model
from masksl.compress import make
from masksl.methods.fedpm import CODES, FedPmConfig
from masksl.methods.fedpm.ballot import Ballot, Rule
from masksl.methods.fedpm.codes import reference_of, start
from masksl.methods.fedpm.dither import numbers
from masksl.methods.fedpm.frozen import Frozen
from masksl.methods.fedpm.theta import SCALE, Theta
from masksl.methods.fedpm.votes import decode_mask

NETWORK = "conv6"
VOTERS, ROUNDS = 10, 5
CHANGE = 0.1  # standard deviation of what training adds to a score

Row = dict[str, Any]


class _Case(NamedTuple):
    """What a round begins with, and each client's probabilities after training."""

    frozen: Frozen
    rule: Rule
    theta: Theta
    trained: list[np.ndarray]


def measure(repeats: int) -> list[Row]:
    """Encode and decode a mask by each code, and the votes of a round by each way.

    Returns
    -------
    list[dict[str, Any]]
        What is coded, by what, bits a weight with headers, and medians of CPU seconds
        to encode and to decode, everything included that a side computes for it.
    """
    rows = []
    for code in CODES:
        case = _case(FedPmConfig(code=code))
        rows.append({"coded": "mask", "by": code} | _time_mask(case, repeats))
    for down in ("full", "previous", "dither"):
        config = FedPmConfig(code="dither", down=down)  # type: ignore[arg-type]
        row = _time_votes(_case(config), repeats)
        rows.append({"coded": "votes", "by": down} | row)
    return rows


def _case(config: FedPmConfig) -> _Case:
    units = model.build(NETWORK, 10, 3, seed=0)
    frozen, rule, theta = start(nn.Sequential(*units), config, 0)
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        theta = Theta.of_votes(rng.binomial(VOTERS, theta.probabilities), VOTERS)
    trained = []
    for _ in range(VOTERS):
        change = CHANGE * rng.standard_normal(frozen.elements, np.float32)
        trained.append(1 / (1 + np.exp(-(theta.scores + change))))
    return _Case(frozen, rule, theta, trained)


def _time_mask(case: _Case, repeats: int) -> Row:
    frozen, rule, theta, trained = case
    place = ROUNDS + 1, 0

    def encode() -> bytes:
        reference = reference_of(rule, frozen, theta, *place)
        return make("mask").encode(torch.from_numpy(mask), reference=reference)

    def decode() -> np.ndarray:
        reference = reference_of(rule, frozen, theta, *place)
        return decode_mask(frame, frozen.elements, reference)

    mask = _drawn(case, 0, trained[0])
    frame, encoding = _timed(encode, repeats)
    decoded, decoding = _timed(decode, repeats)
    assert np.array_equal(decoded, mask)
    bits = 8 * len(frame) / frozen.elements
    return {"bits": bits, "encode_seconds": encoding, "decode_seconds": decoding}


def _time_votes(case: _Case, repeats: int) -> Row:
    frozen, rule, theta, trained = case
    voters = range(VOTERS)
    votes = np.stack([_drawn(case, n, trained[n]) for n in voters]).sum(0)
    ballot, encoding = _timed(
        lambda: Ballot.of(votes, ROUNDS + 1, voters, theta, rule), repeats
    )
    after, decoding = _timed(lambda: ballot.theta(theta, rule), repeats)
    assert np.array_equal(after.index, votes)
    bits = 8 * sum(map(len, ballot.frames)) / frozen.elements
    return {"bits": bits, "encode_seconds": encoding, "decode_seconds": decoding}


def _drawn(case: _Case, client: int, trained: np.ndarray) -> np.ndarray:
    """Draw the mask of a client by its numbers, bool, shape (d,)."""
    drawn = numbers(case.rule.seed, ROUNDS + 1, client, case.frozen.elements)
    return drawn < np.rint(trained * SCALE)


def _timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Return what a call returns, and the median of the CPU seconds that it takes."""
    result, seconds = call(), []
    for _ in range(repeats):
        began = time.process_time()
        result = call()
        seconds.append(time.process_time() - began)
    return result, median(seconds)


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table(title=f"{NETWORK} on CIFAR-10, {VOTERS} clients")
    for column in ("coded", "by", "bits", "encode, s", "decode, s"):
        table.add_column(
            column, justify="left" if column in ("coded", "by") else "right"
        )
    for row in rows:
        seconds = (f"{row[f'{way}_seconds']:.3f}" for way in ("encode", "decode"))
        table.add_row(row["coded"], row["by"], f"{row['bits']:.4f}", *seconds)
    Console().print(table)
