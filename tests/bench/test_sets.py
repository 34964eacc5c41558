"""The benchmark of frame-sets."""

import torch
from torch import nn

from masksl import model
from masksl.bench import sets as bench
from masksl.codec import wire
from masksl.compress import encode_set, make


def network() -> nn.Module:
    return nn.Sequential(*model.build("small_cnn", 10, 1, seed=0))


def test_rows_are_complete() -> None:
    rows = bench.measure(repeats=2, network=network())
    names = [(row["what"].split()[0], row["way"]) for row in rows]
    count = len(network().state_dict())
    ways = ["checksum and copy", "frame-set", f"{count} frames"]
    assert names == [
        *(("encode", way) for way in ways),
        *(("decode", way) for way in ways),
        *(2 * [("sum", "whole tensors"), ("sum", "positions")]),
    ]
    assert rows[1]["bytes"] == rows[0]["bytes"] + 24  # a header for a checksum
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)
    bench.show(rows)


def test_ways_give_the_same() -> None:
    tensors = network().state_dict()
    frames = bench.frames_encoded(tensors)
    decoded = bench.frames_decoded(frames, tensors)
    assert all(torch.equal(decoded[name], own) for name, own in tensors.items())
    data = bench.copy_encoded(wire.to_host(list(tensors.values())))
    assert bytes(bench.copy_decoded(data).numpy()) == data
    assert len(data) == 8 + sum(tensor.nbytes for tensor in tensors.values())
    like = {name: own.detach() for name, own in network().named_parameters()}
    updates = [{n: torch.randn(t.shape) for n, t in like.items()} for _ in range(3)]
    sets = [encode_set(u, make("sp", sparsity=0.9), joined=True) for u in updates]
    by_positions = bench.sum_of_positions(sets, like)
    whole = bench.sum_of_tensors(sets, like)
    for name, own in like.items():
        assert by_positions[name].shape == own.shape
        torch.testing.assert_close(by_positions[name], whole[name], rtol=0, atol=0)


def test_turns_are_timed() -> None:
    called: list[str] = []
    ways = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = bench.in_turn(ways, 2)
    assert called == list("ababab")  # once for the caches
    assert [len(each) for each in seconds.values()] == [2, 2]
