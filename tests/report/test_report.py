"""Measurements on activations, and tables and figures from results."""

import csv
import json
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from masksl import main as training
from masksl.bench import activations
from masksl.dataset import DatasetConfig, load
from masksl.report.__main__ import REPORTS, main
from masksl.report.cells import ACCOUNTS, read_run
from masksl.report.figure2 import _series, figure2
from masksl.report.figure3 import figure3
from masksl.report.runs import runs
from masksl.report.table1 import rounds_to_target, table1
from masksl.report.tables import ReportError
from masksl.runtime import results
from masksl.runtime.checkpoint import CheckpointError
from tests.conftest import ROOT, settings_of
from tests.test_main import QUICK, masksl


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the measurements of a network trained on 300 digits."""
    folder = tmp_path_factory.mktemp("figure2")
    network = activations.Network("small_cnn", "digits", 300, 0.05)
    result = activations.figure2_of_training(network, "data")
    activations.show_figure2(result)
    (folder / "digits.json").write_text(json.dumps(result))
    return folder


def test_figure2_measures_every_compressor_at_every_cut(measured: Path) -> None:
    result = json.loads((measured / "digits.json").read_text())
    assert result["network"]["images"] == 300
    errors: dict[tuple[str, int, str], float] = {}
    for row in result["rows"]:
        series = _series(row)
        if series in ("qu", "qq", "fp", "ms"):
            assert row["bits"] == pytest.approx(row["budget"], abs=0.05)
        if series in ("sp", "rt", "ms", "qu"):
            errors[row["cut"], row["budget"], series] = row["error"]
        if series == "ms context":
            assert row["bits"] < row["budget"]
            assert row["error"] == errors[row["cut"], row["budget"], "ms"]
    assert len(errors) == 3 * 6 * 4
    for cut in ("shallow", "medium", "deep"):
        for budget in range(3, 9):
            sent = {s: errors[cut, budget, s] for s in ("sp", "rt", "ms")}
            assert sent["ms"] < sent["sp"] < sent["rt"]
            if budget > 3:
                half = errors[cut, budget - 1, "qu"] / errors[cut, budget, "qu"]
                assert 1.8 < half < 2.5  # a bit more halves the error


def test_figure2_is_written_and_the_same_again(measured: Path) -> None:
    texts = figure2(measured)
    rows = list(csv.DictReader(texts["figure2.csv"].splitlines()))
    assert len(rows) == 3 * 6 * 9
    assert {row["cut"] for row in rows} == {"shallow", "medium", "deep"}
    assert all(float(row["norm"]) > 0 for row in rows)
    assert texts["figure2.md"].count("\n") == 2 + 3 * 8
    assert (measured / "figure2.png").stat().st_size > 20_000
    assert figure2(measured) == texts


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_figure2_stands_beside_the_papers(
    dataset: str, measured: Path, tmp_path: Path
) -> None:
    result = json.loads((measured / "digits.json").read_text())
    result["network"]["dataset"] = dataset
    (tmp_path / "one.json").write_text(json.dumps(result))
    lines = figure2(tmp_path)["paper.md"].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    norms = {
        _series(row): row["norm"]
        for row in result["rows"]
        if (row["cut"], row["budget"]) == ("medium", 3)
    }
    name = f"small_cnn, {dataset}, medium"
    shown = {line[1]: float(line[2]) for line in cells if line[0] == name}
    assert shown["MS, 2-norm"] == pytest.approx(norms["ms"], rel=1e-3)
    for compressor in ("qu", "sp", "rt"):
        ratio = norms[compressor] / norms["ms"]
        assert shown[f"{compressor.upper()} / MS"] == pytest.approx(ratio, abs=0.005)
    paper = [line[1:] for line in cells if line[0] == f"the paper's, {dataset}"]
    assert len(paper) == (4 if dataset == "cifar10" else 0)
    if paper:
        assert paper[0] == "MS, 2-norm|504.4|200|90.6|43.2|21|10.4".split("|")
        assert paper[1] == "QU / MS|1.02|1.20|1.27|1.32|1.35|1.34".split("|")


def test_held_out_images_are_not_trained_on() -> None:
    network = activations.Network("small_cnn", "digits", None, 0.05)
    _, images, seen = activations.train(network, "data")
    assert len(images) == activations.HELD_OUT
    assert seen == 1437 - activations.HELD_OUT


@pytest.mark.parametrize("sync", ["step", "round"])
def test_figure2_of_a_run_is_that_of_its_network(sync: str, tmp_path: Path) -> None:
    settings = settings_of("rounds=2", "clients=2", "compressor=none", "cut=medium")
    training.run(settings | {"client_sync": sync}, tmp_path)
    units, _ = activations.trained(tmp_path)
    whole = torch.nn.Sequential(*units).eval()
    data = load(DatasetConfig(name="digits"))
    images, labels = data.test_batch(torch.arange(len(data.test.labels)))
    with torch.no_grad():
        hits = int((whole(images).argmax(1) == labels).sum())
    summary = results.read_summary(tmp_path)
    assert hits / len(labels) == pytest.approx(summary["top1"], abs=1e-9)
    if sync == "step":
        result = activations.figure2_of_run(tmp_path, "data")
        assert result["network"]["images"] == 2 * 1437
        assert len(result["rows"]) == 3 * 6 * 9


def test_figure2_needs_one_half(tmp_path: Path) -> None:
    job = ("rounds=1", "clients=2", "dataset.limit=60", "client_sync=never")
    training.run(settings_of(*job), tmp_path)
    with pytest.raises(CheckpointError, match="have a half each, expected one"):
        activations.figure2_of_run(tmp_path, "data")


def test_comparison_is_at_one_error() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(32, 16, 16, 16, generator=generator).relu()
    rows = activations.compare(tensor)
    paper = rows[0]
    assert paper["share"] == pytest.approx(1, abs=0.01)
    for row in rows:
        if "error" in row["options"]:
            assert row["error_ratio"] == pytest.approx(1, abs=0.02)
        if "bits" in row["options"]:
            assert row["share"] == pytest.approx(1, abs=0.03)
            assert row["error_ratio"] < 0.5
    activations.show_targets([{"activation": "noise"} | row for row in rows])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep over three compressors and two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    done = masksl(
        "--multirun",
        *(*QUICK, "evaluations=2", "target=0.2", "compressor=ms,none,qu", "seed=1,2"),
        f"hydra.sweep.dir={folder}",
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_runs_are_put_together_by_setting(sweep: Path) -> None:
    texts = runs(sweep)
    rows = list(csv.DictReader(texts["runs.csv"].splitlines()))
    assert [row["seeds"] for row in rows] == ["2", "2", "2"]
    assert "compressor=ms" in rows[0]["setting"]
    assert "compressor=qu" in rows[2]["setting"]
    for row in rows:
        folder = sweep / row["setting"]
        found = [results.read_summary(folder / f"seed={seed}") for seed in (1, 2)]
        top1 = [100 * summary["top1"] for summary in found]
        assert float(row["top-1, %"]) == pytest.approx(fmean(top1), rel=1e-4)
        assert float(row["top-1, %, std"]) == pytest.approx(stdev(top1), abs=1e-4)
    assert texts["runs.md"].splitlines()[0].startswith("| setting | seeds | top-1, % |")


def test_runs_without_a_seed_in_their_place_are_settings(
    sweep: Path, tmp_path: Path
) -> None:
    for name in ("ms", "qu"):
        shutil.copytree(find(sweep, name, 1), tmp_path / name)
    lines = runs(tmp_path)["runs.md"].splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [["| ms", "1"], ["| qu", "1"]]


def first_at(rows: list[dict[str, Any]], target: float) -> float | None:
    """Return the rounds trained until a target is reached, by another algorithm."""
    for row in rows:
        for check in row["checks"]:
            if check["top1"] >= target:
                return row["round"] - 1 + check["step"] / row["steps"]
        if row["top1"] >= target:
            return row["round"]
    return None


def test_table1_counts_what_was_sent_until_the_target(sweep: Path) -> None:
    texts = table1(sweep)
    lines = [line.split(" | ") for line in texts["table1.md"].splitlines()[2:]]
    assert [[cell.strip("| ") for cell in line[:3]] for line in lines] == [
        [account, "small_cnn, digits, 3 clients", "shallow"] for account in ACCOUNTS
    ]
    for compressor, column in (("qu", 3), ("ms", 4)):
        saved = []
        for seed in (1, 2):
            folders = {name: find(sweep, name, seed) for name in (compressor, "none")}
            rounds = [first_at(results.read_rows(f), 0.2) for f in folders.values()]
            ours, plain = map(results.read_summary, folders.values())
            if None in rounds:
                continue
            activations = plain["paper_bytes"] * plain["compression_factor"]
            saved.append(activations / ours["paper_bytes"] * rounds[1] / rounds[0])
        expected = f"{fmean(saved):.2f} ±" if saved else "INF"
        assert lines[0][column].startswith(expected)
    assert texts["accuracy.md"].count("\n") == 3
    rows = list(csv.DictReader(texts["table1.csv"].splitlines()))
    assert [row["compressor"] for row in rows] == ["none"] * 2 + ["qu"] * 2 + ["ms"] * 2


def find(sweep: Path, compressor: str, seed: int) -> Path:
    """Return a run folder of the sweep."""
    (found,) = sweep.glob(f"*compressor={compressor}*/seed={seed}")
    return found


def synthetic(folder: Path, tops: list[float], **settings: Any) -> None:
    """Write a finished run with these accuracies, 1,000 dense bytes a round."""
    given = {"dataset.name": "digits", "model.name": "small_cnn", "clients": 2}
    given |= {"cut": "shallow", "compressor.name": "none", "seed": 1, "target": 0.5}
    sent = settings.pop("sent", 1000)
    run = results.RunFolder(folder)
    run.write_config(json.dumps(given | settings) + "\n")
    for number, top1 in enumerate(tops, 1):
        row = {"round": number, "steps": 4, "checks": [], "loss": 1, "top1": top1}
        run.add_row(row | {"bytes": {"training": {"up": {"activation": sent}}}})
    summary = {"bytes": {}, "paper_bytes": sent * len(tops), "top1": tops[-1]}
    summary |= {"rounds": len(tops)}
    summary |= {"compression_factor": 1000 / sent, "factor_total": 1000 / sent}
    summary |= {"bytes_total": sent * len(tops)}
    (folder / results.SUMMARY).write_text(json.dumps(summary))


def other_method(folder: Path, **settings: Any) -> None:
    """Write a finished run of an invented method without the keys of ``split``."""
    synthetic(folder, [0.4, 0.6], **{"method.name": "gossip"} | settings)
    config = results.read_config(folder)
    del config["cut"]
    (folder / results.CONFIG).write_text(json.dumps(config) + "\n")
    summary = {"method": "gossip", "top1": 0.6, "best_top1": 0.6, "bytes_total": 2e6}
    summary |= {"rounds": 2}
    (folder / results.SUMMARY).write_text(json.dumps(summary | {"uploads": 7}))


def test_runs_leave_out_columns_that_no_run_has(tmp_path: Path) -> None:
    for seed in (1, 2):
        other_method(tmp_path / "gossip" / f"seed={seed}", seed=seed)
    texts = runs(tmp_path)
    assert texts["runs.md"].splitlines() == [
        "| setting | method | seeds | top-1, % | best top-1, % | everything, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| gossip | gossip | 2 | 60.00 ± 0.00 | 60.00 ± 0.00 | 2.0 ± 0.0 |",
    ]
    (row,) = csv.DictReader(texts["runs.csv"].splitlines())
    assert row["everything, MB"] == "2"
    assert "bits an element" not in row


def test_runs_show_a_missing_value(tmp_path: Path) -> None:
    other_method(tmp_path / "gossip")
    for seed, error in ((1, 0.25), (2, None)):
        folder = tmp_path / "split" / f"seed={seed}"
        synthetic(folder, [0.5], seed=seed)
        summary = results.read_summary(folder)
        summary |= {"best_top1": 0.5, "relative_error": error}
        (folder / results.SUMMARY).write_text(json.dumps(summary))
    texts = runs(tmp_path)
    lines = [line.split(" | ") for line in texts["runs.md"].splitlines()]
    column = lines[0].index("relative error")
    assert [line[column] for line in lines[2:]] == ["–", "0.250 (1 of 2)"]
    assert [line[1] for line in lines[2:]] == ["gossip", "split"]
    rows = list(csv.DictReader(texts["runs.csv"].splitlines()))
    assert [row["relative error"] for row in rows] == ["", "0.25"]


def test_runs_without_what_a_table_needs_are_refused(tmp_path: Path) -> None:
    synthetic(tmp_path / "none", [0.6])
    synthetic(tmp_path / "qu", [0.6], **{"compressor.name": "qu"})
    other_method(tmp_path / "gossip")
    for report in (table1, figure3):
        text = "gossip/config.yaml: no cut, method=gossip$"
        with pytest.raises(ReportError, match=text):
            report(tmp_path)
    path = tmp_path / "gossip" / results.CONFIG
    settings = json.loads(path.read_text()) | {"cut": "deep"}
    path.write_text(json.dumps(settings) + "\n")
    text = "gossip/summary.json: no bytes, method=gossip$"
    with pytest.raises(ReportError, match=text):
        read_run(path.parent)


def test_tables_name_the_method_only_if_it_is_not_split(tmp_path: Path) -> None:
    for method in ("split", "chain"):
        for name in ("none", "qu"):
            settings = {"method.name": method, "compressor.name": name}
            synthetic(tmp_path / method / name, [0.6], **settings)
    lines = table1(tmp_path / "split")
    assert "split" not in lines["table1.md"] + lines["table1.csv"]
    texts = table1(tmp_path)
    assert "| small_cnn, digits, 2 clients, chain | shallow |" in texts["table1.md"]
    assert "| small_cnn, digits, 2 clients | shallow |" in texts["table1.md"]
    for text in (texts["table1.csv"], figure3(tmp_path)["figure3.csv"]):
        rows = list(csv.DictReader(text.splitlines()))
        assert {row["method"] for row in rows} == {"chain", "split"}
        assert {row["compressor"] for row in rows} == {"none", "qu"}


def test_figure3_leaves_out_rounds_without_training(tmp_path: Path) -> None:
    for name in ("none", "qu"):
        synthetic(tmp_path / name, [0.4, 0.6], **{"compressor.name": name})
    rows = results.read_rows(tmp_path / "qu")
    rows[0]["loss"] = None
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "qu" / results.METRICS).write_text(text)
    lines = csv.DictReader(figure3(tmp_path)["figure3.csv"].splitlines())
    losses = [line for line in lines if line["figure"] == "loss"]
    assert [(line["compressor"], line["round"]) for line in losses] == [
        ("none", "1"),
        ("none", "2"),
        ("qu", "2"),
    ]


def cell(folder: Path, column: int) -> str:
    """Return a cell of the first line of Table 1."""
    return table1(folder)["table1.md"].splitlines()[2].split(" | ")[column].strip(" |")


def test_table1_says_how_many_runs_a_value_describes(tmp_path: Path) -> None:
    synthetic(tmp_path / "none1", [0.4, 0.6, 0.7])
    synthetic(tmp_path / "none2", [0.4, 0.4, 0.4], seed=2)  # never reaches the target
    of = {"compressor.name": "qu", "sent": 100}
    synthetic(tmp_path / "qu1", [0.3, 0.4, 0.5], **of)
    assert cell(tmp_path, 3) == "6.67"  # 10 times the bytes, 2 rounds over 3
    synthetic(tmp_path / "qu2", [0.5, 0.5, 0.5], seed=2, **of)
    assert cell(tmp_path, 3) == "6.67 (1 of 2)"
    synthetic(tmp_path / "qu3", [0.5, 0.5, 0.5], seed=3, **of)  # against the mean, 2
    assert (
        cell(tmp_path, 3)
        == f"{(20 / 3 + 20) / 2:.2f} ± {stdev([20 / 3, 20]):.2f} (2 of 3)"
    )
    synthetic(tmp_path / "sp", [0.1, 0.1], **{"compressor.name": "sp"})
    synthetic(tmp_path / "mine", [0.5], **{"compressor.name": "mine", "sent": 500})
    header = table1(tmp_path)["table1.md"].splitlines()[0]
    assert "| cut | QU | SP | MINE |" in header
    assert (cell(tmp_path, 4), cell(tmp_path, 5)) == ("INF", "4.00")


def test_runs_that_are_not_alike_are_not_averaged(tmp_path: Path) -> None:
    synthetic(tmp_path / "none", [0.6])
    synthetic(tmp_path / "a", [0.6], **{"compressor.name": "qu", "compressor.bits": 3})
    other = {"compressor.name": "qu", "compressor.bits": 4, "seed": 2}
    synthetic(tmp_path / "b", [0.6], **other)
    with pytest.raises(ReportError, match="qu differ in compressor.bits: 3, 4"):
        table1(tmp_path)
    shutil.rmtree(tmp_path / "b")
    synthetic(tmp_path / "c", [0.6], **{"compressor.name": "qu", "compressor.bits": 3})
    with pytest.raises(ReportError, match="seed=1: 2 runs of small_cnn, digits"):
        table1(tmp_path)
    shutil.rmtree(tmp_path / "none")
    with pytest.raises(ReportError, match="without compression below"):
        table1(tmp_path)


def test_compressors_that_differ_in_more_are_not_compared(tmp_path: Path) -> None:
    synthetic(tmp_path / "none", [0.6], **{"optimizer.lr": 0.1, "cut": "shallow"})
    other = {"compressor.name": "qu", "gradient_compressor.name": "qu", "cut": "deep"}
    synthetic(tmp_path / "qu", [0.6], **{"optimizer.lr": 0.1, **other})
    assert cell(tmp_path, 1) == "small_cnn, digits, 2 clients"
    synthetic(tmp_path / "qu", [0.6], **{"optimizer.lr": 0.2, **other})
    text = "deep, none and qu differ in optimizer.lr: 0.1, 0.2"
    with pytest.raises(ReportError, match=text):
        table1(tmp_path)


def test_a_cut_takes_its_own_baseline_where_it_has_one(tmp_path: Path) -> None:
    synthetic(tmp_path / "shallow", [0.6])
    synthetic(tmp_path / "deep", [0.4, 0.6], cut="deep")
    of = {"compressor.name": "qu", "sent": 100}
    for cut in ("shallow", "medium", "deep"):
        synthetic(tmp_path / f"qu_{cut}", [0.6], cut=cut, **of)
    lines = table1(tmp_path)["table1.md"].splitlines()[2:5]
    assert [line.split(" | ")[3] for line in lines] == ["10.00", "10.00", "20.00"]


def test_rounds_to_target_end_at_the_first_evaluation_that_reaches_it() -> None:
    rows = [
        {"round": 1, "steps": 8, "top1": 0.4, "checks": [{"step": 2, "top1": 0.5}]},
        {"round": 2, "steps": 8, "top1": 0.7, "checks": [{"step": 6, "top1": 0.6}]},
    ]
    targets = (0.3, 0.5, 0.55, 0.7, 0.8)
    assert [rounds_to_target(rows, t) for t in targets] == [0.25, 0.25, 1.75, 2, None]


def test_reports_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, folder, text in (
        ("runs", tmp_path, f"no summary.json below {tmp_path}"),
        ("figure2", tmp_path, "no measurements of python -m masksl.bench in"),
        ("runs", tmp_path / "none", "none': not a folder"),
        ("table1", tmp_path, f"no summary.json below {tmp_path}"),
        ("table1", tmp_path, f"--into {tmp_path}/in: must be a folder outside of"),
    ):
        into = ["--into", f"{tmp_path}/in"] if "--into" in text else []
        monkeypatch.setattr("sys.argv", ["report", name, str(folder), *into])
        with pytest.raises(SystemExit):
            main()
        assert text in capsys.readouterr().err


def test_finished_runs_are_copied_beforehand(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = tmp_path / "shown"
    arguments = ["report", "table1", str(sweep), "--into", str(into)]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert table1(into) == table1(sweep)
    assert figure3(into) == figure3(sweep)
    assert (into / "table1.md").read_text() == table1(sweep)["table1.md"]
    kept = {path.name for path in into.rglob("*") if path.is_file()}
    assert kept == {
        *(results.CONFIG, results.METRICS, results.SUMMARY),
        *("table1.md", "table1.csv", "accuracy.md", "figure3.png"),
    }
    for path in into.rglob(results.CONFIG):  # no paths of this machine
        assert "dataset.root" not in path.read_text()


def test_figure3_has_every_round_of_every_compressor(sweep: Path) -> None:
    rows = list(csv.DictReader(figure3(sweep)["figure3.csv"].splitlines()))
    assert (sweep / "figure3.png").stat().st_size > 20_000
    for compressor in ("none", "ms", "qu"):
        mine = [row for row in rows if row["compressor"] == compressor]
        assert {row["seeds"] for row in mine} == {"2"}
        losses = [row for row in mine if row["figure"] == "loss"]
        tops = [row for row in mine if row["figure"] == "top-1"]
        assert [float(row["round"]) for row in losses] == [1, 2]
        assert len(tops) == 4
        found = [results.read_rows(find(sweep, compressor, seed)) for seed in (1, 2)]
        last = [100 * run[-1]["top1"] for run in found]
        assert float(tops[-1]["mean"]) == pytest.approx(fmean(last), rel=1e-4)
        assert float(tops[-1]["std"]) == pytest.approx(stdev(last), abs=1e-4)


PAGES = {
    "figure2": "docs/results-figure2.md",
    "figure2_small": "docs/results-figure2.md",
    "table1_small": "docs/results-table1.md",
    "fedavg_mnist": "docs/methods/fedavg.md",
}
SHOWN = {
    ("figure2", "paper.md"),
    ("table1_small", "table1.md"),
    ("table1_small", "accuracy.md"),
    ("fedavg_mnist", "fedavg.md"),
}


@pytest.mark.parametrize(
    ("report", "folder"),
    [
        ("figure2", "figure2"),
        ("figure2", "figure2_small"),
        ("runs", "figure2/runs"),
        ("runs", "cifar10_compressors"),
        ("table1", "table1_small"),
        ("figure3", "table1_small"),
        ("fedavg", "fedavg_mnist"),
    ],
)
def test_what_is_committed_comes_out_again(
    report: str, folder: str, tmp_path: Path
) -> None:
    shown = ROOT / "results" / folder
    shutil.copytree(shown, tmp_path / folder)
    page = PAGES.get(folder, "docs/results.md")
    shows = (ROOT / page).read_text(encoding="utf-8")
    for name, text in REPORTS[report](tmp_path / folder).items():
        assert text == (shown / name).read_text(encoding="utf-8")
        if (folder, name) in SHOWN:
            assert text in shows
    for name in (path.name for path in shown.glob("*.png")):
        assert f"results/{folder}/{name}" in shows
        size = (shown / name).stat().st_size
        assert (tmp_path / folder / name).stat().st_size == pytest.approx(size, rel=0.2)


def test_the_readme_quotes_lines_of_what_is_committed() -> None:
    table = ROOT / "results/table1_small/table1.md"
    committed = table.read_text(encoding="utf-8").splitlines()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, found, rest = readme.partition("\n".join(committed[:2]) + "\n")
    quoted = rest.split("\n\n")[0].splitlines()
    assert found and quoted
    assert [line for line in committed if line in quoted] == quoted


def test_a_report_is_written_into_the_folder(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report", "runs", str(sweep)])
    main()
    assert capsys.readouterr().out == (sweep / "runs.md").read_text()
    assert (sweep / "runs.csv").exists()
