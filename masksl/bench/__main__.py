"""Command line of the benchmarks.

Each benchmark prints a table and writes its rows as JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from masksl.bench import (
    activations,
    bias,
    coding,
    compress,
    masks,
    pictures,
    pruning,
    sets,
)
from masksl.dataset import DATASETS, DatasetError
from masksl.model import ARCHITECTURES
from masksl.runtime.checkpoint import CheckpointError
from masksl.training.compute import describe


def main() -> None:
    """Run the benchmark named by the command line."""
    parser = argparse.ArgumentParser(prog="python -m masksl.bench", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)

    speed = commands.add_parser("compress", help="speed and size of every compressor")
    speed.add_argument("--repeats", type=int, default=7, help="times each is timed")
    speed.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    batches = "batches of as many samples of 64x16x16"
    speed.add_argument(
        "--samples", nargs="+", type=int, default=compress.SIZES, help=batches
    )

    together = commands.add_parser(
        "sets", help="a model's message, and sums of sparse updates, as frame-sets"
    )
    together.add_argument("--repeats", type=int, default=15, help="turns timed")

    coded = commands.add_parser(
        "coding", help="bits and times of entropy coding, on a run's activations"
    )
    coded.add_argument("--run", type=Path, required=True, help="folder of the run")
    coded.add_argument("--base", type=Path, help="another checkout, timed in turn")
    coded.add_argument("--repeats", type=int, default=5, help="processes of each")

    pictured = commands.add_parser(
        "pictures", help="ec beside picture coders, on a run's activations"
    )
    pictured.add_argument(
        "--run", type=Path, required=True, nargs="+", help="folders of runs"
    )

    biased = commands.add_parser(
        "bias", help="what compressors change in the gradients of both halves of a run"
    )
    biased.add_argument("--run", type=Path, required=True, help="folder of the run")
    biased.add_argument("--batches", type=at_least_2, default=24, help="2 or more")

    kept = commands.add_parser("masks", help="FedPM's masks and votes, by each code")
    kept.add_argument("--repeats", type=int, default=5, help="times each is timed")

    pruned = commands.add_parser("pruning", help="FLASH's masks beside its training")
    pruned.add_argument("--repeats", type=int, default=3, help="times each is timed")

    targets = commands.add_parser(
        "activations", help="bits of ec and ms at one error, on CIFAR-10 activations"
    )
    targets.add_argument(
        "--vgg19-images", type=int, default=20_000, help="images that VGG19 trains on"
    )

    curves = commands.add_parser(
        "figure2", help="error against bits of every compressor, on activations"
    )
    curves.add_argument(
        "--run", type=Path, help="folder of a run whose network it is, instead of these"
    )
    curves.add_argument("--model", choices=ARCHITECTURES, default="small_cnn")
    curves.add_argument("--dataset", choices=DATASETS, default="digits")
    curves.add_argument("--images", type=int, help="images to train on, default all")
    curves.add_argument("--lr", type=float, default=0.05, help="learning rate")

    engines = commands.add_parser(
        "engine", help="exchanges, training steps and memory on every engine"
    )
    parts = ("exchanges", "deployed", "steps", "compression", "iterations", "memory")
    engines.add_argument("--parts", nargs="+", choices=parts, default=parts)
    engines.add_argument("--clients", nargs="+", type=int, default=(10, 100, 1000))
    sizes = 1_000, 120_000, 1_200_000
    engines.add_argument("--sizes", nargs="+", type=int, default=sizes)
    engines.add_argument(
        "--most",
        type=int,
        default=1_200_000_000,
        help="bytes of all frames of an exchange; more is left out",
    )
    engines.add_argument("--repeats", type=int, default=20, help="exchanges timed")

    for command in (speed, together, pictured, biased, kept, pruned, targets, curves):
        command.add_argument("--threads", type=int, default=2, help="PyTorch threads")
    every = speed, together, coded, pictured, biased, kept, pruned, targets, curves
    for command in (*every, engines):
        command.add_argument("--json", help="file to write, default bench_NAME.json")
    for command in (coded, pictured, biased, targets, curves, engines):
        command.add_argument("--root", default="data", help="folder of the data sets")
    arguments = parser.parse_args()
    if getattr(arguments, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: must be cpu, no CUDA device is here")
    try:
        run(arguments)
    except (CheckpointError, DatasetError) as error:
        print(f"masksl: {error}", file=sys.stderr)
        sys.exit(1)


def at_least_2(text: str) -> int:
    """Return a number of batches, refuse less than two."""
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text}: must be 2 or more")
    return number


def run(arguments: argparse.Namespace) -> None:
    """Run a benchmark, print its table, write its rows."""
    result: dict[str, Any] = {}
    if arguments.benchmark not in ("engine", "coding"):  # these set their threads
        torch.set_num_threads(arguments.threads)
        result["threads"] = arguments.threads
    match arguments.benchmark:
        case "compress":
            result["rows"] = compress.measure(
                arguments.repeats, arguments.device, arguments.samples
            )
            result["hardware"] = describe(torch.device(arguments.device))
            compress.show(result["rows"], result["hardware"])
        case "sets":
            result["rows"] = sets.measure(arguments.repeats)
            sets.show(result["rows"])
        case "coding":
            given = arguments.run, arguments.root, arguments.base, arguments.repeats
            result |= coding.measure(*given)
            coding.show(result)
        case "pictures":
            result["networks"] = pictures.measure(arguments.run, arguments.root)
            pictures.show(result["networks"])
        case "bias":
            result |= bias.measure(arguments.run, arguments.root, arguments.batches)
            bias.show(result)
        case "masks":
            result["rows"] = masks.measure(arguments.repeats)
            masks.show(result["rows"])
        case "pruning":
            result["rows"] = pruning.measure(arguments.repeats)
            pruning.show(result["rows"])
        case "activations":
            result["rows"] = activations.targets(arguments.root, arguments.vgg19_images)
            activations.show_targets(result["rows"])
        case "figure2":
            if arguments.run is not None:
                result |= activations.figure2_of_run(arguments.run, arguments.root)
            else:
                network = activations.Network(
                    arguments.model, arguments.dataset, arguments.images, arguments.lr
                )
                result |= activations.figure2_of_training(network, arguments.root)
            activations.show_figure2(result)
        case "engine":
            # Imported here: the compressors are timed without Flower and Ray.
            # pylint: disable-next=import-outside-toplevel
            from masksl.bench import engine

            result |= engine.run(arguments)
            engine.show(result)
    path = Path(arguments.json or f"bench_{arguments.benchmark}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
