"""Message types and records of FedPM."""

import struct
from collections.abc import Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from masksl.compress import FrameError
from masksl.methods.fedpm.ballot import Ballot
from masksl.methods.fedpm.theta import MOST_VOTES, Theta
from masksl.methods.fedpm.votes import decode_votes, encode_votes
from masksl.runtime.messages import FRAMES, arrays_of, raw_of, raw_record

TRAIN = "train.local"

MASK = "mask"
DIGEST = "digest"
VOTES = "votes"  # of the round before
VOTERS = "voters"  # that round, and who voted; with all votes how many they were
THETA = "theta"  # all votes that count; also the group of them in a state

_ROUND = struct.Struct("<I")


def ballot_records(ballot: Ballot, clients: int, dense: int) -> dict[str, ArrayRecord]:
    """Return the records of the votes of a round.

    Parameters
    ----------
    ballot : Ballot
        The votes.
    clients : int
        Number of all clients.
    dense : int
        Bytes of the probabilities in float32.
    """
    flags = np.zeros(clients, np.uint8)
    flags[list(ballot.voters)] = 1
    voters = np.packbits(flags, bitorder="little").tobytes()
    return {
        VOTES: _frames_record(ballot.frames, dense),
        VOTERS: raw_record(_ROUND.pack(ballot.round) + voters),
    }


def ballot_of(content: RecordDict, clients: int) -> Ballot:
    """Return the votes of a message; `FrameError` if something is missing."""
    data = raw_of(content, VOTERS, _ROUND.size + -(-clients // 8))
    (round_,) = _ROUND.unpack(data[: _ROUND.size])
    packed = np.frombuffer(data[_ROUND.size :], np.uint8)
    voters = np.flatnonzero(np.unpackbits(packed, bitorder="little")).tolist()
    if not voters or voters[-1] >= clients:
        raise FrameError(f"votes of the clients {voters} of {clients}")
    return Ballot(round_, tuple(voters), _frames_of(content, VOTES))


def theta_records(theta: Theta, dense: int) -> dict[str, ArrayRecord]:
    """Return the records of all votes that count."""
    frames = encode_votes(theta.index, theta.voters)
    return {
        THETA: _frames_record(frames, dense),
        VOTERS: raw_record(_ROUND.pack(theta.voters)),
    }


def theta_of(content: RecordDict, count: int) -> Theta:
    """Return the probabilities by all votes of a message."""
    (voters,) = _ROUND.unpack(raw_of(content, VOTERS, _ROUND.size))
    if not 0 < voters <= MOST_VOTES:
        raise FrameError(f"{voters} voters")
    votes = decode_votes(_frames_of(content, THETA), count, voters)
    return Theta.of_votes(votes, voters)


def _frames_record(frames: Sequence[bytes], dense: int) -> ArrayRecord:
    """Return a record of frames that stand for one tensor of so many bytes."""
    record = ArrayRecord()
    for place, data in enumerate(frames):
        size = 0 if place else dense
        record[str(place)] = Array(
            dtype="uint8", shape=(size,), stype=FRAMES, data=data
        )
    return record


def _frames_of(content: RecordDict, kind: str) -> tuple[bytes, ...]:
    record = arrays_of(content, kind)
    arrays = list(record.values()) if record is not None else []
    if not arrays or any(array.stype != FRAMES for array in arrays):
        raise FrameError(f"message without {kind}")
    return tuple(array.data for array in arrays)
