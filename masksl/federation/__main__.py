"""Entry point: a job on a federation of this machine.

python -m masksl.federation [--folder DIR] [key=value ...]
"""

import argparse
import shlex
import sys
from datetime import datetime
from pathlib import Path

from masksl import signals

if __name__ == "__main__":
    signals.end_at_once()  # first: the imports below take seconds

# pylint: disable=wrong-import-position,ungrouped-imports
from masksl import config
from masksl.config import ConfigError
from masksl.federation.processes import LOOPBACK, Federation, FederationError, free_port
from masksl.runtime.results import SUMMARY
from masksl.server_app import AUTO

PROJECT = Path(__file__).parents[2]
PATHS = ("dataset.root", "resume")


def main() -> None:
    """Run a job on a federation; the exit status is 1 if it did not finish."""
    parser = argparse.ArgumentParser(
        prog="python -m masksl.federation", description=__doc__
    )
    stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/federation") / stamp
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    signals.unwind()
    try:
        overrides, clients = _overrides(arguments.overrides)
        with Federation(arguments.folder, clients) as federation:
            federation.wait(federation.submit(PROJECT, overrides))
        if not list(federation.folder.glob(f"outputs/*/*/{SUMMARY}")):
            raise FederationError(f"the run did not finish; see {federation.folder}")
    except (ConfigError, FederationError) as error:
        print(f"masksl: {error}", file=sys.stderr)
        sys.exit(1)
    except signals.Stopped:
        signals.end(lambda: None)  # the federation has ended


def _overrides(given: list[str]) -> tuple[str, int]:
    """Return the overrides of the run, quoted as in a shell, and its clients."""
    address = f"'{LOOPBACK}:{free_port()}'"
    streams = f"engine.address={address}", f"engine.bind={address}"
    overrides = ["engine=superlink", *streams, *given]
    settings = config.compose(overrides)
    for key in PATHS:  # the run has another directory
        value = settings[key]
        if value not in ("null", AUTO):
            path = str(Path(str(value)).absolute())
            quoted = path.replace("\\", r"\\").replace("'", r"\'")
            overrides.append(f"{key}='{quoted}'")
    return shlex.join(overrides), int(settings["clients"])


if __name__ == "__main__":
    main()
