"""How the server keeps client halves together, `SplitConfig.client_sync`."""

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import nn

from masksl.compress import FrameError
from masksl.methods.split.coding import ChangeCoder
from masksl.methods.split.messages import BUFFER, COLLECT
from masksl.methods.split.shared import CodedSharedHalf, SharedHalf
from masksl.runtime import messages
from masksl.runtime.clients import EVALUATION, UNKNOWN, ClientInfo
from masksl.runtime.compressors import EXACT, compressor_of
from masksl.runtime.messages import ends_run
from masksl.runtime.round import Round
from masksl.settings import Settings, read
from masksl.training.optimizer import OptimizerConfig
from masksl.training.tensors import Tensors, average, tensors_of

_HALF = "client half"


class HalfSync:
    """Collects what clients send up of their halves, and sends down what it makes.

    Parameters
    ----------
    settings : Settings
        Configuration of the run.
    module : nn.Module
        The initial client half.

    Attributes
    ----------
    shared : SharedHalf | None
        The half of all clients; None under ``client_sync=never``.
    """

    def __init__(self, settings: Settings, module: nn.Module) -> None:
        self.shared = _shared_half(settings, module)
        self._coder = f"model_compressor {settings['model_compressor.name']}"
        self._halves: dict[int, Tensors] = {}
        self._buffers: ArrayRecord | None = None  # averaged for an evaluation

    def begin(self) -> None:
        """Begin a round."""
        self._halves = {}

    # --- training ---------------------------------------------------------------------

    def attach(
        self, round_: Round, client: ClientInfo, content: RecordDict, step: int
    ) -> None:
        """Add to a message what its client lacks of the shared half."""
        if self.shared is not None:
            with ends_run(round_.place(step, label=_HALF)), round_.watch("codec"):
                self.shared.attach(content, client)

    def compare(self, round_: Round, replies: Mapping[int, RecordDict]) -> None:
        """Compare the clients' copies with the server's; one that differs is replaced.

        Called with the first replies of a round.
        """
        for number, content in replies.items():
            with ends_run(round_.place(0, number, messages.DIGEST)):
                if self.shared is not None and not self.shared.equals(content):
                    round_.manager.clients[number].version = UNKNOWN

    def collect(
        self,
        round_: Round,
        replies: Mapping[int, RecordDict],
        sizes: Mapping[int, int],
        step: int,
    ) -> None:
        """Collect what clients sent up with their replies to `train.backward`.

        Parameters
        ----------
        round_ : Round
            The current round.
        replies : Mapping[int, RecordDict]
            Replies by client.
        sizes : Mapping[int, int]
            Samples of this step by client.
        step : int
            Step within the round.
        """
        if self.shared is None:
            return
        received: dict[int, Tensors] = {}
        for number, content in replies.items():
            with ends_run(round_.place(step, number, _HALF)), round_.watch("codec"):
                half = self.shared.change_of(content)
            if half is not None:
                received[number] = half
        if self.shared.optimizer is None:
            self._halves |= received
        elif received:
            samples = [sizes[number] for number in received]
            self._move(round_, average(list(received.values()), samples), step)

    def finish(self, round_: Round) -> None:
        """Average the halves sent up in a round, weighted by samples."""
        halves = dict(sorted(self._halves.items()))
        if halves:
            weights = [round_.manager.clients[n].train_samples for n in halves]
            self._move(round_, average(list(halves.values()), weights), 0)

    def _move(self, round_: Round, mean: Tensors, step: int) -> None:
        """Move the shared half by the average of what clients sent up."""
        assert self.shared is not None
        seed = round_.seed("compress.shared", step=step)
        place = round_.place(step, label=f"{_HALF}, {self._coder}")
        with ends_run(place), round_.watch("codec"):
            self.shared.move(mean, rate=round_.lr_at(step), seed=seed)

    # --- evaluation -------------------------------------------------------------------

    def average_buffers(self, round_: Round) -> None:
        """Average the buffers of the clients of a round, if these are their own."""
        shared = self.shared
        if shared is None or not shared.keeps_buffers_apart:
            return
        clients = round_.active(round_.active(round_.clients), EVALUATION)
        sent = {c.number: round_.message(0) for c in clients}
        replies = round_.exchange(COLLECT, sent, step=0, label=BUFFER)
        received = []
        for number, content in replies.items():
            with ends_run(round_.place(0, number, BUFFER)), round_.watch("codec"):
                own = messages.model_of(content, shared.buffers, BUFFER)
                if own is None:
                    raise FrameError(f"message without {BUFFER}")
                received.append(own)
        if received:
            weights = [round_.manager.clients[n].train_samples for n in replies]
            shared.tensors |= average(received, weights, torch.float64)
        with ends_run(round_.place(0, label=f"{_HALF}, {BUFFER}")):
            self._buffers = messages.model_record(shared.buffers)

    def attach_buffers(self, content: RecordDict) -> None:
        """Add the averaged buffers to a message, if clients have their own."""
        if self._buffers is not None:
            content[BUFFER] = self._buffers

    # --- state ------------------------------------------------------------------------

    def state(self) -> dict[str, Tensors]:
        """Return copies of the shared half, by group."""
        return {} if self.shared is None else self.shared.state()

    def facts(self) -> dict[str, int]:
        """Return its version."""
        return {} if self.shared is None else {"version": self.shared.version}

    def load(self, tensors: Tensors, facts: Mapping[str, int]) -> None:
        """Restore what `state` and `facts` returned."""
        if self.shared is not None:
            self.shared.load(tensors, facts["version"])

    def client_records(self, client: ClientInfo) -> Mapping[str, ArrayRecord]:
        """Return what the server knows of the half of a client."""
        if self.shared is None:
            return {}
        return self.shared.client_records(client)


def _shared_half(settings: Settings, module: nn.Module) -> SharedHalf | None:
    """Return the initial client half, None if clients stay apart."""
    sync = settings["client_sync"]
    if sync == "never":
        return None
    parameters = [name for name, _ in module.named_parameters()]
    own = read(OptimizerConfig, settings, "optimizer") if sync == "step" else None
    compressor = compressor_of(settings, "model_compressor")
    if compressor == EXACT:
        return SharedHalf(tensors_of(module), parameters, optimizer=own)
    coder = ChangeCoder(compressor)
    return CodedSharedHalf(tensors_of(module), parameters, optimizer=own, coder=coder)
