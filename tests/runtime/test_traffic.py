"""The ledger: every byte, by direction, kind and phase, and the simulated link."""

import pytest
import torch

from masksl import compress
from masksl.compress import FrameError, make
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


def ms_frame(samples: int) -> int:
    count = samples * UNIT
    return HEADER + 13 + 4 * (count // 100) + count // 4


def none_frame(samples: int) -> int:
    return HEADER + 1 + 4 * samples * UNIT


def half_frames() -> int:
    """Frames of the client half: weights 64x1x3x3, four vectors of 64, a counter."""
    return (45 + 4 * 576) + 4 * (33 + 4 * 64) + (29 + 8)


@pytest.fixture(scope="module")
def by_round() -> Training:
    return train(*OVERRIDES)


def test_every_byte_of_a_run_is_counted(by_round: Training) -> None:
    steps = [size for sizes in TRAIN_STEPS for size in sizes]
    tests = [size for sizes in TEST_STEPS for size in sizes]
    expected = {
        "training": {
            "up": {
                "activation": sum(map(ms_frame, steps)),
                "label": 103,
                "model": 2 * half_frames(),
            },
            "down": {"gradient": sum(map(none_frame, steps))},
        },
        "evaluation": {
            "up": {"activation": sum(map(ms_frame, tests)), "label": 41},
            "down": {"model": 2 * half_frames()},
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
    assert row["bytes"]["training"]["up"]["model"] == 5 * half_frames()
    # In round 2 those of the first step have it from the evaluation.
    assert row["bytes"]["training"]["down"]["model"] == 3 * half_frames()
    assert row["bytes"]["evaluation"]["down"]["model"] == 2 * half_frames()


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
    training = train(*OVERRIDES, *options, *compressor)
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
        last = [half_frames() for sizes in TRAIN_STEPS if step == len(sizes) - 1]
        expected += max(last, default=0)
    for step in range(3):
        sizes = [sizes[step] for sizes in TEST_STEPS if step < len(sizes)]
        expected += max(ms_frame(size) + size for size in sizes)
    expected += half_frames()
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
    function, arguments = record["w"].__reduce__()
    plain = messages.ArrayRecord()
    plain["w"] = function(*arguments)
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
    with pytest.raises(FrameError, match="model of 2 tensors, expected 1"):
        messages.model_of(content, {"w": like["w"]})
    with pytest.raises(FrameError, match=r"tensor w of shape \(2, 3\)"):
        messages.model_of(content, {"w": torch.zeros(3, 2), "n": like["n"]})
    assert messages.model_of(messages.RecordDict(), like) is None


def test_dense_bytes_are_float32_bytes() -> None:
    frame = compress.make("sp").encode(torch.rand(5, 7).half())
    content = messages.RecordDict({"activation": messages.frame_record(frame)})
    assert messages.entries(content) == [Entry("activation", len(frame), 4 * 35)]
