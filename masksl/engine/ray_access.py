"""Access to Ray: nobody but its owner may reach a Ray that this program starts.

Whoever reaches the ports of a Ray can run code in it. Started as it comes, Ray listens
on every address of the machine and asks for nothing. `closed` starts one that listens
on 127.0.0.1 alone and demands a token; `joining` joins a cluster that demands one.

The token is in the environment or in a file of the user, and in no other place: not in
the configuration, on a command line or in a log. Ray's processes inherit the
environment with which Ray is started. That of this process is restored afterwards, so
that other processes which it starts do not get the token.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

# Compiled modules, which show their names to nobody.
# pylint: disable=no-name-in-module,no-member
import grpc
from ray._private import grpc_utils, ray_constants, services
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationTokenLoader,
    Config,
)
from ray.core.generated.gcs_service_pb2 import (  # type: ignore[attr-defined]
    GetClusterIdRequest,
)
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

from masksl.engine import EngineError

MODE = "RAY_AUTH_MODE"
MODES = ("token", "disabled")
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_FILE = "RAY_AUTH_TOKEN_PATH"
LOOPBACK = ("127.0.0.1", "::1")
ANSWER_TIMEOUT = 5.0  # seconds for a cluster to say whether it accepts a token


@contextmanager
def closed() -> Iterator[None]:
    """Let a Ray that is started within the context be closed to everybody else.

    It listens on the loopback interface alone, and it demands a token: that of the
    user, if there is one, else a random one. A user who sets ``RAY_AUTH_MODE=disabled``
    gets a Ray without a token, on the same interface.

    Raises
    ------
    EngineError
        If the variables of the user are wrong, or Ray would listen elsewhere.
    """
    mode = _mode()
    token = {} if mode == "disabled" or _has_token() else {TOKEN: secrets.token_hex(32)}
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    # Ray has one switch for the address on which it listens, named after the systems
    # on which it is off. This process may have imported Ray, and so read it, already.
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment(
            {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", MODE: mode} | token
        ):
            address = services.get_node_ip_address()
            if address not in LOOPBACK:
                raise EngineError(
                    f"Ray would listen on {address}: must be {' or '.join(LOOPBACK)}"
                )
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters


@contextmanager
def joining(address: str) -> Iterator[None]:
    """Let a cluster be joined within the context, with the token of the user.

    Parameters
    ----------
    address : str
        ``auto`` or ``host:port`` of the cluster.

    Raises
    ------
    EngineError
        If the user has no token, or the cluster refuses it or demands none. With
        ``RAY_AUTH_MODE=disabled`` a cluster that demands none is joined.
    ConnectionError, ValueError
        If there is no such address.
    """
    mode = _mode()
    where = f"engine.address={address!r}"
    if mode == "token" and not _has_token():
        raise EngineError(
            f"{where}: {TOKEN} must hold the token of the cluster, or {TOKEN_FILE} "
            f"name a file with it; {MODE}=disabled joins a cluster without one"
        )
    with _environment({MODE: "disabled"}):
        refused = _refuses(address, with_token=mode == "token")
        is_open = mode == "token" and not _refuses(address, with_token=False)
    if refused:
        raise EngineError(
            f"{where}: the cluster refused to be joined; {TOKEN} must hold the token "
            f"with which it was started, and {MODE} be token"
        )
    if is_open:
        raise EngineError(
            f"{where}: the cluster demands no token; it must be started with "
            f"{MODE}=token, or joined with {MODE}=disabled"
        )
    with _environment({MODE: mode}):
        yield


def reread() -> None:
    """Let Ray read its variables again; call it only while there is no Ray.

    Ray keeps the mode and the token that it has read first.
    """
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


def _mode() -> str:
    """Return the mode that the user has set, else ``token``."""
    mode = os.environ.get(MODE) or "token"
    if mode.lower() not in MODES:  # Ray would take it for disabled
        raise EngineError(f"{MODE}={mode!r}: must be {' or '.join(MODES)}")
    return mode.lower()


def _has_token() -> bool:
    """Return whether the user has a token, in a variable or in a file."""
    reread()
    try:
        loader = AuthenticationTokenLoader.instance()
        return bool(loader.has_token(ignore_auth_mode=True))
    except AuthenticationError as error:
        name = os.environ.get(TOKEN_FILE)
        raise EngineError(
            f"{TOKEN_FILE}={name!r}: must be a file that holds a token"
        ) from error


def _refuses(address: str, *, with_token: bool) -> bool:
    """Return whether a cluster answers that it needs another token.

    `ray.init` would try for 20 seconds and write a line for each try.
    """
    loader = AuthenticationTokenLoader.instance()
    header = loader.get_token_for_http_header(ignore_auth_mode=True)
    metadata = list(header.items()) if with_token else None
    target = services.canonicalize_bootstrap_address(address) or address
    with grpc_utils.init_grpc_channel(target) as channel:
        gcs = NodeInfoGcsServiceStub(channel)
        try:
            gcs.GetClusterId(
                GetClusterIdRequest(), timeout=ANSWER_TIMEOUT, metadata=metadata
            )
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables within the context and let Ray read them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        reread()
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
