"""A plugin: a client waits, once, where a file says so, as long as another is there.

The file that the variable MASKSL_TEST_HOLD names has one line: a message type, a round
and a client. While the client waits, a file beside it, ``<name>.held``, has the id of
its process.
"""

import os
import time
from pathlib import Path

from masksl.methods.fedavg.client import CLIENT as FEDAVG
from masksl.methods.split.client import CLIENT as SPLIT
from tests.kill import make_mortal


def hold_at(place: str) -> None:
    """Wait if the place is that of the file."""
    order = Path(os.environ["MASKSL_TEST_HOLD"])
    if not order.exists() or order.read_text(encoding="utf-8") != place:
        return
    held, part = order.with_suffix(".held"), order.with_suffix(".part")
    part.write_text(str(os.getpid()), encoding="utf-8")
    order.unlink()
    part.rename(held)
    while held.exists():
        time.sleep(0.05)


for _method in (FEDAVG, SPLIT):
    make_mortal(_method, hold_at)
