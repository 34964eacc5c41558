"""A network of its own for a node, whose packets can be lost without a word.

Three network namespaces in a row: this one, a router, and the node's. Where the router
does not forward, packets vanish; no end is told.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE, ROUTER_HERE = "198.51.100.1", "198.51.100.2"  # addresses for documentation
ROUTER_NODE, NODE = "203.0.113.1", "203.0.113.2"
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


class Network:
    """The namespaces of the router and of the node, which processes keep.

    Parameters
    ----------
    router, node : int
        Ids of these processes.
    """

    def __init__(self, router: int, node: int) -> None:
        self._router, self._node = router, node

    @property
    def entry(self) -> list[str]:
        """What begins the command line of a program in the namespace of the node."""
        return _entry(self._node)

    def forward(self, works: bool) -> None:
        """Let packets pass, or vanish."""
        _call(*_entry(self._router), "sh", "-c", f"echo {int(works)} > {FORWARD}")

    def connect(self) -> None:
        """Connect the namespaces."""
        link, router, node = _link(self._router), self._router, self._node
        inside, outside = _entry(router), _entry(node)
        _call(*_veth(link), "netns", str(router))
        _call("ip", "addr", "add", f"{HERE}/24", "dev", link)
        _call("ip", "link", "set", link, "up")
        _call("ip", "route", "add", f"{NODE}/32", "via", ROUTER_HERE)
        _call(*inside, *_veth("out"), "netns", str(node))
        _call(*inside, "ip", "addr", "add", f"{ROUTER_HERE}/24", "dev", "peer")
        _call(*inside, "ip", "addr", "add", f"{ROUTER_NODE}/24", "dev", "out")
        _call(*outside, "ip", "addr", "add", f"{NODE}/24", "dev", "peer")
        for entry, device in ((inside, "peer"), (inside, "out"), (outside, "peer")):
            _call(*entry, "ip", "link", "set", device, "up")
        _call(*outside, "ip", "link", "set", "lo", "up")
        _call(*outside, "ip", "route", "add", "default", "via", ROUTER_NODE)
        self.forward(True)


@contextmanager
def network() -> Iterator[Network]:
    """Make a network; it vanishes with the processes that keep its namespaces.

    That takes the kernel a while. The end that is here is removed at once.
    """
    keepers = []
    try:
        for _ in range(2):
            command = ["unshare", "--net", "sleep", "infinity"]
            # pylint: disable-next=consider-using-with
            keepers.append(subprocess.Popen(command))
        for keeper in keepers:
            while _namespace(keeper.pid) == _namespace(os.getpid()):
                assert keeper.poll() is None
                time.sleep(0.01)
        made = Network(*(keeper.pid for keeper in keepers))
        made.connect()
        yield made
    finally:
        if keepers:
            command = ["ip", "link", "delete", _link(keepers[0].pid)]
            subprocess.run(command, check=False, capture_output=True)
        for keeper in keepers:
            keeper.kill()
            keeper.wait()


def is_possible() -> bool:
    """Return whether this user may make namespaces and connect them."""
    try:
        with network():
            return True
    except (OSError, subprocess.CalledProcessError, AssertionError):
        return False


def _link(router: int) -> str:
    """Return the name of the device that is here."""
    return f"masksl{router}"


def _veth(name: str) -> list[str]:
    return ["ip", "link", "add", name, "type", "veth", "peer", "name", "peer"]


def _entry(pid: int) -> list[str]:
    return ["/usr/bin/nsenter", f"--net=/proc/{pid}/ns/net"]


def _namespace(pid: int) -> Path:
    return Path(f"/proc/{pid}/ns/net").readlink()


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
