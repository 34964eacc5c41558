"""Every frame in a run is decoded as one of the size that is expected."""

import ast
from typing import Any

import pytest
import torch

from masksl.compress import make
from masksl.methods.split import client as split
from masksl.methods.split.messages import ACTIVATION, BACKWARD, EVALUATE, FORWARD
from masksl.methods.split.payloads import Payloads
from masksl.runtime import messages
from masksl.runtime.messages import RunError
from tests.conftest import ROOT, train

DECODERS = {"decode", "decode_sparse", "kept_positions"}
UNIT = 64 * 4 * 4  # elements of a sample's activation
SMALL = (
    *("clients=2", "dataset.limit=82", "dataset.test_limit=40", "rounds=1"),
    *("batch_size=20", "eval_batch_size=10"),
)


def test_every_call_says_what_it_expects() -> None:
    """A frame alone may declare more than memory holds."""
    found = set()
    for room in ("methods", "runtime"):
        for path in (ROOT / "masksl" / room).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call):
                    continue
                called = node.func
                name = called.id if isinstance(called, ast.Name) else ""
                if isinstance(called, ast.Attribute):  # `compress.decode`, no method
                    owner = called.value
                    module = isinstance(owner, ast.Name) and owner.id in (
                        *("compress", "base", "codec"),
                    )
                    name = called.attr if module else ""
                if name in DECODERS:
                    given = {keyword.arg for keyword in node.keywords}
                    assert "max_elements" in given, f"{path}:{node.lineno}"
                    found.add((path.stem, name))
    assert {("payloads", "decode"), ("client", "decode")} <= found
    assert {("payloads", "kept_positions"), ("client", "kept_positions")} <= found


@pytest.mark.parametrize(
    ("kind", "samples", "place"),
    [(FORWARD, 21, "round 1, step 0"), (EVALUATE, 10, "round 1, step 0")],
)
def test_an_activation_of_too_many_samples_is_refused(
    kind: str, samples: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tail of one sample joins the batch before it: 21 are the most of 20."""
    handler = split.HANDLERS[kind]

    def send_more(client: Any, content: Any) -> Any:
        reply = handler(client, content)
        frame = make("none").encode(torch.rand(samples + 1, 64, 4, 4))
        reply[ACTIVATION] = messages.frame_record(frame)
        return reply

    monkeypatch.setitem(split.HANDLERS, kind, send_more)
    with pytest.raises(RunError) as caught:
        train(*SMALL)
    assert str(caught.value) == (
        f"{place}, client 0, compressor ms: frame declares {(samples + 1) * UNIT} "
        f"elements, not 1 to {samples * UNIT}"
    )


def test_batches_with_a_joined_tail_are_decoded() -> None:
    """41 samples a client are batches of 20 and 21."""
    assert train(*SMALL).rows[0]["samples"] == 82


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), 20 * UNIT), (("compressor=sp", "gradient_positions=kept"), 844)],
)
def test_a_gradient_has_the_elements_of_the_activation(
    options: tuple[str, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_more(self: Any, *_: Any) -> Any:
        frame = make("none").encode(torch.rand(expected + 1))
        return messages.frame_record(frame)

    monkeypatch.setattr(Payloads, "_encoded", send_more)
    with pytest.raises(RunError) as caught:
        train(*SMALL, *options)
    assert str(caught.value) == (
        "round 1, step 0, client 0, gradient_compressor none: "
        f"frame declares {expected + 1} elements, not 1 to {expected}"
    )


def test_positions_are_those_of_the_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = split.HANDLERS[BACKWARD]

    def remember_more(client: Any, content: Any) -> Any:
        frame = make("sp").encode(torch.rand(21, 64, 4, 4))
        client.context.state["sent"] = messages.frame_record(frame)
        return backward(client, content)

    monkeypatch.setitem(split.HANDLERS, BACKWARD, remember_more)
    with pytest.raises(RunError) as caught:
        train(*SMALL, "compressor=sp", "gradient_positions=kept")
    assert str(caught.value).endswith(
        f"frame declares {21 * UNIT} elements, not 1 to {20 * UNIT}"
    )
