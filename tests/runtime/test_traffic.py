"""The ledger: every byte, by direction, kind and phase, and the simulated link."""

import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from masksl import compress
from masksl.compress import FrameError, make
from masksl.engine.packing import pack, unpack
from masksl.methods.split.messages import label_record, labels_of
from masksl.runtime import messages
from masksl.runtime.ledger import Entry, Ledger, Link
from tests.conftest import Training, train

# 103 samples over 2 clients (52 and 51), batches of 25: tails of 2 and of 1, which
# joins; 41 test images in batches of 10: 21 and 20 images.
OVERRIDES = (
    "clients=2",
    "dataset.limit=103",
    "dataset.test_limit=41",
    "batch_size=25",
    "eval_batch_size=10",
    "rounds=2",
)
TRAIN_STEPS = [[25, 25, 2], [25, 26]]
TEST_STEPS = [[10, 10, 1], [10, 10]]
UNIT = 64 * 4 * 4  # elements of a sample's activation
HEADER = 44  # of four dimensions, without the compressor's parameters
SET_HEADER = 32  # of a frame-set of exact tensors


def ms_frame(samples: int) -> int:
    count = samples * UNIT
    return HEADER + 13 + 4 * (count // 100) + count // 4


def none_frame(samples: int) -> int:
    return HEADER + 1 + 4 * samples * UNIT


def half_set() -> int:
    """Bytes of the client half: weights 64x1x3x3, four vectors of 64, a counter."""
    return SET_HEADER + 4 * 576 + 4 * (4 * 64) + 8


@pytest.fixture(scope="module")
def by_round() -> Training:
    return train(*OVERRIDES, "client_sync=round")


def test_every_byte_of_a_run_is_counted(by_round: Training) -> None:
    steps = [size for sizes in TRAIN_STEPS for size in sizes]
    tests = [size for sizes in TEST_STEPS for size in sizes]
    expected = {
        "training": {
            "up": {
                "activation": sum(map(ms_frame, steps)),
                "label": 103,
                "model": 2 * half_set(),
            },
            "down": {"gradient": sum(map(none_frame, steps))},
        },
        "evaluation": {
            "up": {"activation": sum(map(ms_frame, tests)), "label": 41},
            "down": {"model": 2 * half_set()},
        },
    }
    for row in by_round.rows:
        assert row["bytes"] == expected
        assert row["messages"] == {
            "training": {
                "up": {"activation": 5, "label": 5, "model": 2},
                "down": {"gradient": 5},
            },
            "evaluation": {
                "up": {"activation": 5, "label": 5},
                "down": {"model": 2},
            },
        }
    total = by_round.traffic
    assert total.bytes("label") == 2 * (103 + 41)
    assert total.messages("activation", phase="training") == 2 * 5
    assert total.bytes(direction="down", phase="training") == 2 * sum(
        map(none_frame, steps)
    )


def test_compression_factor_is_that_of_the_frames(by_round: Training) -> None:
    row = by_round.rows[0]
    sent = sum(row["bytes"][phase]["up"]["activation"] for phase in row["bytes"])
    assert row["compression_factor"] == pytest.approx(4 * 144 * UNIT / sent, rel=1e-12)


def test_bytes_under_step() -> None:
    row = train(*OVERRIDES, "client_sync=step").rows[1]
    # A step brings the half to all that take part; gradients and statistics go up.
    assert row["bytes"]["training"]["up"]["model"] == 5 * half_set()
    # In round 2 those of the first step have it from the evaluation.
    assert row["bytes"]["training"]["down"]["model"] == 3 * half_set()
    assert row["bytes"]["evaluation"]["down"]["model"] == 2 * half_set()


@pytest.mark.parametrize(
    ("compressor", "header", "bits"),
    [
        (("gradient_compressor=none",), 1, 32),
        (("gradient_compressor=none", "gradient_compressor.values=float16"), 1, 16),
        (("gradient_compressor=qu", "gradient_compressor.bits=8"), 18, 8),
    ],
)
def test_bytes_of_gradients_at_kept_positions(
    compressor: tuple[str, ...], header: int, bits: int
) -> None:
    """A frame of the k values in one dimension, for every client and step."""
    options = ("compressor=sp", "compressor.sparsity=0.95", "gradient_positions=kept")
    training = train(*OVERRIDES, "client_sync=round", *options, *compressor)
    counts = [size * UNIT for sizes in TRAIN_STEPS for size in sizes]
    kept = [count // 20 for count in counts]
    down = sum(28 + 4 + header + bits * k // 8 for k in kept)
    up = sum(HEADER + 11 + 4 * k + n // 8 for k, n in zip(kept, counts, strict=True))
    for row in training.rows:
        assert row["bytes"]["training"]["down"] == {"gradient": down}
        assert row["bytes"]["training"]["up"]["activation"] == up
    # Factors compare with the whole gradient, not with the part that was sent.
    total = training.traffic
    assert total.dense("gradient") == 2 * 4 * sum(counts)
    assert total.dense("activation", phase="training") == 2 * 4 * sum(counts)


def test_bytes_under_never() -> None:
    row = train(*OVERRIDES, "client_sync=never").rows[0]
    assert "model" not in row["bytes"]["training"]["up"]
    assert "down" not in row["bytes"]["evaluation"]


def test_link_time_is_that_of_the_slowest_client() -> None:
    link = Link(up_mbps=8, down_mbps=80, latency_ms=50)
    # 1 MB at 80 Mbit/s, 3 MB at 8 Mbit/s, 50 ms each way.
    seconds = link.seconds([1_000_000, 5], [2_000_000, 3_000_000])
    assert seconds == pytest.approx(0.05 + 0.1 + 0.05 + 3.0)
    ledger = Ledger(link)
    ledger.exchange(
        "training",
        {0: [Entry("model", 600_000, 0), Entry("gradient", 400_000, 0)]},
        {0: [Entry("activation", 1_000_000, 4_000_000)], 1: []},
    )
    assert ledger.round.link_seconds == pytest.approx(0.05 + 0.1 + 0.05 + 1.0)
    ledger.begin_round()
    assert ledger.round.bytes() == 0
    assert ledger.total.bytes() == 2_000_000
    assert ledger.total.dense("activation", "up", "training") == 4_000_000


def test_link_time_of_a_round(by_round: Training) -> None:
    """Every exchange, client for client, by hand."""
    expected = 0.0
    for step in range(3):
        sizes = [sizes[step] for sizes in TRAIN_STEPS if step < len(sizes)]
        expected += max(ms_frame(size) + size for size in sizes)
        expected += max(map(none_frame, sizes))
        last = [half_set() for sizes in TRAIN_STEPS if step == len(sizes) - 1]
        expected += max(last, default=0)
    for step in range(3):
        sizes = [sizes[step] for sizes in TEST_STEPS if step < len(sizes)]
        expected += max(ms_frame(size) + size for size in sizes)
    expected += half_set()
    seconds = by_round.rows[0]["link_seconds"]
    assert seconds == pytest.approx(8 * expected / 100e6, rel=1e-9)


# --- records of messages -----------------------------------------------------------


def test_frames_are_sent_without_a_copy() -> None:
    frame = make("ms").encode(torch.rand(100))
    record = messages.frame_record(frame)
    array = record["frame"]
    assert array.data is frame
    assert (array.dtype, array.shape, array.stype) == (
        "uint8",
        (len(frame),),
        "masksl.frame",
    )


@pytest.mark.parametrize(("classes", "size"), [(10, 1), (256, 1), (257, 2), (1000, 2)])
def test_labels_take_the_smallest_type(classes: int, size: int) -> None:
    labels = torch.tensor([0, classes - 1, 5])
    content = messages.RecordDict({"label": label_record(labels, classes)})
    assert messages.entries(content) == [Entry("label", 3 * size, 3 * size)]
    assert torch.equal(labels_of(content, classes, 3), labels)
    with pytest.raises(FrameError, match="bytes of labels for 4 samples"):
        labels_of(content, classes, 4)
    if classes in (10, 1000):
        with pytest.raises(FrameError, match=f"label {classes - 1} of {classes - 1}"):
            labels_of(content, classes - 1, 3)


def test_live_arrays_become_bytes_only_when_pickled() -> None:
    tensor = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    record = messages.state_record({"w": tensor, "n": torch.tensor(5)})
    device = torch.device("cpu")
    assert messages.state_tensors(record, device)["w"] is tensor
    reduced: Any = record["w"].__reduce__()
    rebuild, arguments = reduced
    plain = messages.ArrayRecord()
    plain["w"] = rebuild(*arguments)
    copy = messages.state_tensors(plain, device)["w"]
    assert torch.equal(copy, tensor)
    assert copy.dtype == tensor.dtype


def test_models_must_match() -> None:
    like = {"w": torch.zeros(2, 3), "n": torch.tensor(0)}
    sent = {"w": torch.rand(2, 3), "n": torch.tensor(2**40)}
    content = messages.RecordDict({"model": messages.model_record(sent)})
    received = messages.model_of(content, like)
    assert received is not None
    assert all(torch.equal(received[name], sent[name]) for name in sent)
    with pytest.raises(FrameError, match="of 2 tensors, expected 1"):
        messages.model_of(content, {"w": like["w"]})
    for other in (
        {"w": torch.zeros(3, 2), "n": like["n"]},
        {"n": like["n"], "w": like["w"]},
    ):
        with pytest.raises(FrameError, match="other dtypes or shapes than expected"):
            messages.model_of(content, other)
    assert messages.model_of(messages.RecordDict(), like) is None
    frame = messages.frame_record(make("none").encode(like["w"]))
    with pytest.raises(FrameError, match="model of type 'masksl.frame', expected"):
        messages.model_of(messages.RecordDict({"model": frame}), like)


def test_a_model_that_diverged_is_not_sent() -> None:
    sent = {"w": torch.ones(3), "v": torch.tensor([1.0, float("nan")])}
    with pytest.raises(compress.NotFiniteError, match="tensor v: 1 of 2 values"):
        messages.model_record(sent)


def old_frames(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of tensors as a `none` frame each, integers as float64."""
    return sum(
        28 + 4 * tensor.ndim + 1 + tensor.numel() * max(tensor.itemsize, 4)
        for tensor in tensors.values()
    )


def test_what_one_header_for_all_tensors_saves() -> None:
    two = {"w": torch.ones(2, 3), "n": torch.tensor(7)}
    (entry,) = messages.entries(
        messages.RecordDict({"model": messages.model_record(two)})
    )
    assert old_frames(two) == (28 + 4 * 2 + 1 + 4 * 6) + (28 + 1 + 8)
    assert entry == Entry("model", SET_HEADER + 4 * 6 + 8, 4 * 6 + 8)
    assert old_frames(two) - entry.bytes == (28 + 4 * 2 + 1) + (28 + 1) - SET_HEADER
    # The half of the default job: 60 uploads, one a client and round, as many back.
    half = {"w": torch.ones(64, 1, 3, 3), "n": torch.tensor(7)}
    half |= {f"v{i}": torch.ones(64) for i in range(4)}
    (entry,) = messages.entries(
        messages.RecordDict({"model": messages.model_record(half)})
    )
    assert old_frames(half) - entry.bytes == 45 + 4 * 33 + 29 - SET_HEADER == 174
    assert (60 * old_frames(half), 60 * entry.bytes) == (212_520, 202_080)


def test_dense_bytes_of_a_set_are_the_senders_and_not_counted_as_sent() -> None:
    update = {"w": torch.randn(50, 40), "h": torch.randn(10).half()}
    update |= {"n": torch.tensor(3), "mask": torch.ones(5, dtype=torch.bool)}
    dense = messages.dense_bytes(update)
    assert dense == 4 * 2000 + 4 * 10 + 8 + 5
    data = compress.encode_set(update, make("sp", sparsity=0.9))
    content = messages.RecordDict({"update": messages.set_record(data, dense)})
    assert messages.entries(content) == [Entry("update", len(data), dense)]
    # The same after the content has been serialised, as on its way to another process.
    (received,) = unpack(pickle.loads(pickle.dumps(pack([content]))))
    for other in (received, recorddict_from_proto(recorddict_to_proto(content))):
        assert messages.entries(other) == [Entry("update", len(data), dense)]
        assert messages.set_of(other, "update") == data
    with pytest.raises(FrameError, match="message without model"):
        messages.set_of(content)


def test_dense_bytes_are_float32_bytes() -> None:
    frame = compress.make("sp").encode(torch.rand(5, 7).half())
    content = messages.RecordDict({"activation": messages.frame_record(frame)})
    assert messages.entries(content) == [Entry("activation", len(frame), 4 * 35)]
