"""Bits a weight and accuracies of FedPM and its baselines, from real runs."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml

from masksl import main as training
from masksl.report.__main__ import main
from masksl.report.bitrate import bitrate
from masksl.report.tables import ReportError
from masksl.runtime import results
from tests.conftest import settings_of

SMALL = (
    *("rounds=5", "clients=3", "dataset.limit=60", "batch_size=20", "evaluations=1"),
    *("dataset.test_limit=40", "threads.server=1", "method.local_epochs=1"),
)
PM = ("method=fedpm", *SMALL)
AVG = ("method=fedavg", "model=mlp_digits", *SMALL)
Texts = dict[str, str]
RUNS = {
    "theta/1": (*PM, "seed=1"),
    "theta/2": (*PM, "seed=2"),
    "global/1": (*PM, "seed=1", "method.code=global"),
    "none/1": (*AVG, "seed=1"),
    "qu/1": (*AVG, "seed=1", "compressor=qu", "compressor.bits=4"),
    "down/1": (*AVG, "seed=1", "model_compressor=qu", "model_compressor.bits=8"),
}
WEIGHTS = 34_110  # of mlp_digits
FRAME = 32  # bytes of a set of its tensors beside their values
TASK = "mlp_digits, digits, 3 clients, iid"
THETA, GLOBAL = f"{TASK}, fedpm, theta", f"{TASK}, fedpm, global"


@pytest.fixture(name="trained", scope="module")
def fixture_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all `RUNS`, not to be changed."""
    folder = tmp_path_factory.mktemp("bitrate")
    for name, overrides in RUNS.items():
        training.run(settings_of(*overrides), folder / name)
    return folder


@pytest.fixture(name="texts", scope="module")
def fixture_texts(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """Return the texts of the report of all `RUNS`."""
    copy = tmp_path_factory.mktemp("report") / "runs"
    return bitrate(Path(shutil.copytree(trained, copy)))


@pytest.fixture(name="runs")
def fixture_runs(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder with all `RUNS`."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def tables(text: str) -> list[dict[str, dict[str, str]]]:
    """Return the cells of each table, by method and heading."""
    found = []
    for part in text.split("\n\n"):
        lines = [line.strip("| ").split(" | ") for line in part.splitlines()]
        rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
        found.append({row["method"]: row for row in rows})
    return found


def change_rows(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Replace the rows of a run."""
    rows = [change(row) for row in results.read_rows(folder)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / results.METRICS).write_text(text)


def change_summary(folder: Path, **more: Any) -> None:
    """Change keys of the summary of a run; None removes a key."""
    summary = results.read_summary(folder) | more
    kept = {key: value for key, value in summary.items() if value is not None}
    (folder / results.SUMMARY).write_text(json.dumps(kept))


def change_config(folder: Path, **more: Any) -> None:
    """Change keys of the configuration of a run."""
    settings = results.read_config(folder)
    settings |= {key.replace("__", "."): value for key, value in more.items()}
    (folder / results.CONFIG).write_text(yaml.safe_dump(settings))


def test_bits_are_those_of_the_bytes(trained: Path, texts: Texts) -> None:
    bits, _ = tables(texts["bitrate.md"])
    assert list(bits) == [
        *("fedpm, global", "fedpm, theta", "fedavg, none", "fedavg, none, down qu"),
        "fedavg, qu",
    ]
    scale = 8 / WEIGHTS / 3
    ups, downs, formulas = [], [], []
    for seed in (1, 2):
        rows = results.read_rows(trained / f"theta/{seed}")
        for row in rows:
            assert row["messages"]["training"]["up"] == {"mask": 3, "digest": 3}
            assert row["bytes"]["training"]["up"]["digest"] == 3 * 8
        sent = [row["bytes"]["training"] for row in rows]
        ups.append([(s["up"]["mask"] + s["up"]["digest"]) * scale for s in sent])
        assert "down" not in sent[0], "everybody has the weights at the start"
        downs.append(sum(results.total(s["down"]) for s in sent[1:]) * scale)
        formulas.append(sum(row["bits_formula"] for row in rows))
        masks = [row["bits_up"] + 8 * 8 / WEIGHTS for row in rows]
        assert ups[-1] == pytest.approx(masks), "the digest adds 8 bytes"
    found = bits["fedpm, theta"]
    assert found["task"] == TASK and found["seeds"] == "2"
    both = [sum(up) + down for up, down in zip(ups, downs, strict=True)]
    sizes = [
        results.read_summary(trained / f"theta/{i}")["model_bytes"] for i in (1, 2)
    ]
    for column, values, form in (
        ("up, round 1", [up[0] for up in ups], ".3f"),
        ("up, round 4", [up[3] for up in ups], ".3f"),
        ("up, round 5", [up[4] for up in ups], ".3f"),
        ("up, all", [sum(up) for up in ups], ".3f"),
        ("down, all", downs, ".3f"),
        ("both ways", both, ".3f"),
        ("formula, all", formulas, ".3f"),
        ("model, bytes", sizes, ",.0f"),
    ):
        assert found[column] == f"{fmean(values):{form}} ± {stdev(values):{form}}"
    assert len(found) == 3 + 8


def test_baselines_are_counted_by_the_same_rule(texts: Texts) -> None:
    """A model of float32 is 32 bits a weight and a frame, down from round 2 on."""
    bits, _ = tables(texts["bitrate.md"])
    dense = 32 + 8 * FRAME / WEIGHTS
    plain = bits["fedavg, none"]
    assert plain["up, round 1"] == plain["up, round 5"] == f"{dense:.3f}" == "32.008"
    assert plain["up, all"] == f"{5 * dense:.3f}"
    assert plain["down, all"] == f"{4 * dense:.3f}"
    assert plain["both ways"] == f"{9 * dense:.3f}"
    assert plain["formula, all"] == "–"
    assert plain["model, bytes"] == f"{4 * WEIGHTS:,d}"
    four = bits["fedavg, qu"]
    assert 4 < float(four["up, round 1"]) < 4.1
    assert four["down, all"] == plain["down, all"]
    eight = bits["fedavg, none, down qu"]
    assert eight["up, all"] == plain["up, all"]
    assert 4 * 8 < float(eight["down, all"]) < 4 * 8.1


def test_accuracies_are_those_of_the_rows(trained: Path, texts: Texts) -> None:
    _, accuracies = tables(texts["bitrate.md"])
    several = [results.read_rows(trained / f"theta/{seed}") for seed in (1, 2)]
    found = accuracies["fedpm, theta"]
    for column, key, place in (
        ("top-1, round 1, %", "top1", 0),
        ("top-1, round 4, %", "top1", 3),
        ("top-1, round 5, %", "top1", 4),
        ("drawn mask, %", "top1_drawn", 4),
        ("mean of masks, %", "top1_mean", 4),
    ):
        values = [100 * rows[place][key] for rows in several]
        assert found[column] == f"{fmean(values):.2f} ± {stdev(values):.2f}"
    plain, rows = accuracies["fedavg, none"], results.read_rows(trained / "none/1")
    assert plain["top-1, round 5, %"] == f"{100 * rows[-1]['top1']:.2f}"
    assert plain["drawn mask, %"] == plain["mean of masks, %"] == "–"


def test_without_fedpm_the_number_of_weights_is_computed(
    runs: Path, texts: Texts
) -> None:
    """The figures are the same, whatever the compressor."""
    whole, _ = tables(texts["bitrate.md"])
    for name in ("theta", "global"):
        shutil.rmtree(runs / name)
    baselines = {name: row for name, row in whole.items() if "fedpm" not in name}
    for names, gone in ((("none", "qu", "down"), "none"), (("qu", "down"), "down")):
        alone, _ = tables(bitrate(runs)["bitrate.md"])
        assert len(alone) == len(names)
        assert alone == {name: baselines[name] for name in alone}
        shutil.rmtree(runs / gone)
    change_summary(runs / "qu/1", bits_per_element=None)
    message = (
        f"{runs}/qu/1/summary.json: no bits_per_element, nor a run of fedpm: number of "
        "weights unknown"
    )
    with pytest.raises(ReportError, match=f"^{re.escape(message)}$"):
        bitrate(runs)


def test_settings_that_differ_are_named(runs: Path) -> None:
    change_config(runs / "theta/2", method__reset_every=0)
    change_config(runs / "none/1", optimizer__lr=0.5, method__aggregate="majority")
    change_config(runs / "down/1", optimizer__lr=0.5, method__aggregate="mean")
    change_config(runs / "qu/1", method__local_epochs=2)
    bits, _ = tables(bitrate(runs)["bitrate.md"])
    assert list(bits) == [
        "fedpm, global, local_epochs 1, reset_every 1",
        "fedpm, theta, local_epochs 1, reset_every 0",
        "fedpm, theta, local_epochs 1, reset_every 1",
        "fedavg, none majority, local_epochs 1, lr 0.5",
        "fedavg, none, down qu, local_epochs 1, lr 0.5",
        "fedavg, qu, local_epochs 2, lr 0.05",
    ]


def height(image: Path) -> int:
    """Return the height of a PNG file in pixels."""
    return int.from_bytes(image.read_bytes()[20:24], "big")


@pytest.mark.parametrize(
    ("partition", "described"), [("chunks", "2"), ("dirichlet_equal", "0.5")]
)
def test_each_partition_is_a_task_with_its_panels(
    partition: str, described: str, runs: Path, texts: Texts
) -> None:
    change_config(runs / "qu/1", dataset__partition=partition)
    after = bitrate(runs)["bitrate.md"]
    task = f"mlp_digits, digits, 3 clients, {partition} {described}"
    cells = tables(texts["bitrate.md"])[0]["fedavg, qu"] | {"task": task}
    assert tables(after)[0]["fedavg, qu"] == cells
    assert height(runs / "bitrate.png") == 2 * 4 * 110


def test_rounds_are_those_that_all_runs_have(runs: Path) -> None:
    change_config(runs / "qu/1", dataset__partition="pathological", rounds=2)
    lines = (runs / "qu/1" / results.METRICS).read_text().splitlines(keepends=True)
    (runs / "qu/1" / results.METRICS).write_text("".join(lines[:2]))
    change_summary(runs / "qu/1", rounds=2)
    bits, accuracies = tables(bitrate(runs)["bitrate.md"])
    assert [name for name in bits["fedavg, qu"] if name.startswith("up")] == [
        *("up, round 1", "up, last round", "up, all")
    ]
    top1 = results.read_rows(runs / "none/1")[4]["top1"]
    assert accuracies["fedavg, none"]["top-1, last round, %"] == f"{100 * top1:.2f}"


def test_a_round_without_uploads_counts_nothing(runs: Path, texts: Texts) -> None:
    """Such a round has no figure of the authors either."""

    def emptied(row: dict[str, Any]) -> dict[str, Any]:
        if row["round"] != 1:
            return row
        return row | {"bytes": {}, "messages": {}, "bits_formula": None}

    change_rows(runs / "global/1", emptied)
    rows = list(csv.DictReader(bitrate(runs)["bitrate.csv"].splitlines()))
    first = rows[0]
    assert first["method"] == "fedpm, global" and first["round"] == "1"
    assert [float(first[key]) for key in ("bits up", "bits down", "formula")] == [0] * 3
    assert rows[1:] == list(csv.DictReader(texts["bitrate.csv"].splitlines()))[1:]


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {name: row[name] for name in row if name != key}


def of_other_kind(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose uploads have a kind that no upload has."""
    sent, counts = {"up": {"votes": 3}}, {"up": {"votes": 1}}
    return row | {"bytes": {"training": sent}, "messages": {"training": counts}}


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another seed of the line": (
        lambda runs: change_config(runs / "theta/2", seed=1),
        f"seed=1: 2 runs of {THETA}",
    ),
    "another number of samples": (
        lambda runs: change_config(runs / "theta/2", dataset__limit=90),
        f"runs of {THETA} and {THETA} differ in dataset.limit: 60, 90",
    ),
    "another batch size of a line": (
        lambda runs: change_config(runs / "qu/1", batch_size=10),
        f"runs of {GLOBAL} and {TASK}, fedavg, qu differ in batch_size: 20, 10",
    ),
    "another method": (
        lambda runs: change_summary(runs / "qu/1", method="sasg"),
        "{runs}/qu/1/summary.json: method=sasg, not fedpm or fedavg",
    ),
    "two methods": (
        lambda runs: change_config(runs / "qu/1", method__name="split"),
        "{runs}/qu/1/summary.json: method=fedavg, split by config.yaml",
    ),
    "scored by clients": (
        lambda runs: change_config(runs / "qu/1", method__evaluate="clients"),
        "{runs}/qu/1/config.yaml: method.evaluate=clients, not server",
    ),
    "no code": (
        lambda runs: change_config(runs / "theta/1", method__code=None),
        "{runs}/theta/1/config.yaml: no method.code",
    ),
    "no partition": (
        lambda runs: change_config(runs / "qu/1", dataset__partition=None),
        "{runs}/qu/1/config.yaml: no dataset.partition",
    ),
    "no elements": (
        lambda runs: change_summary(runs / "theta/1", elements=None),
        "{runs}/theta/1/summary.json: no elements",
    ),
    "other elements": (
        lambda runs: change_summary(runs / "theta/2", elements=7),
        "{runs}/theta/2/summary.json: elements=7, another run of its network has 34110",
    ),
    "no mean": (
        lambda runs: change_rows(runs / "theta/1", without("top1_mean")),
        "{runs}/theta/1/metrics.jsonl, line 1: no top1_mean",
    ),
    "no messages": (
        lambda runs: change_rows(runs / "qu/1", without("messages")),
        "{runs}/qu/1/metrics.jsonl, line 1: no messages",
    ),
    "uploads of another kind": (
        lambda runs: change_rows(runs / "qu/1", of_other_kind),
        "{runs}/qu/1/metrics.jsonl, line 1: bytes of votes up, but no model or update",
    ),
    "fewer rounds": (
        lambda runs: change_config(runs / "qu/1", rounds=6),
        "{runs}/qu/1/metrics.jsonl: 5 rows, rounds=6 by config.yaml",
    ),
    "no runs": (shutil.rmtree, "no summary.json below {runs}"),
}


@pytest.mark.parametrize("how", REFUSALS)
def test_what_cannot_be_compared_is_refused(how: str, runs: Path) -> None:
    damage, message = REFUSALS[how]
    damage(runs)
    with pytest.raises(ReportError) as caught:
        bitrate(runs)
    assert str(caught.value) == message.replace("{runs}", str(runs))
    assert not runs.exists() or not list(runs.glob("*.*")), "nothing is written"


def test_the_command_writes_into_another_folder(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    into = tmp_path / "into"
    command = ["report", "bitrate", str(runs), "--into", str(into)]
    monkeypatch.setattr("sys.argv", command)
    main()
    assert capsys.readouterr().out == (into / "bitrate.md").read_text()
    assert not list(runs.glob("*.*"))
    assert height(into / "bitrate.png") == 4 * 110
    assert (into / "bitrate.png").stat().st_size > 10_000
    with open(into / "bitrate.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * len(RUNS)
    last = rows[-1]
    row = results.read_rows(runs / "qu/1")[-1]
    sent = row["bytes"]["training"]
    assert last == {
        **{"task": TASK, "method": "fedavg, qu", "seed": "1", "round": "5"},
        "bits up": f"{8 * sent['up']['update'] / WEIGHTS / 3:.6f}",
        "bits down": f"{8 * sent['down']['model'] / WEIGHTS / 3:.6f}",
        **{"formula": "", "top1": f"{row['top1']:.4f}", "drawn": "", "mean": ""},
    }
