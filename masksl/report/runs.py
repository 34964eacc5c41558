"""One line of every setting among the runs of a folder, over its seeds."""

from pathlib import Path
from typing import Any

from masksl.report.tables import (
    ReportError,
    comma_separated,
    markdown,
    spread,
    with_spread,
)
from masksl.runtime import results

_RUNS = {  # column: figure of a run, and how it is printed
    "top-1, %": (lambda s: 100 * s["top1"], ".2f"),
    "best top-1, %": (lambda s: 100 * s["best_top1"], ".2f"),
    "bits an element": (lambda s: s["bits_per_element"], ".3f"),
    "relative error": (lambda s: s["relative_error"], ".3f"),
    "activations, MB": (lambda s: s["paper_bytes"] / 1e6, ".1f"),
    "everything, MB": (lambda s: s["bytes_total"] / 1e6, ".1f"),
}


def runs(folder: Path) -> dict[str, str]:
    """Return the tables of all finished runs below a folder, a line a setting.

    Parameters
    ----------
    folder : Path
        Runs lie in it as ``<setting>/seed=<n>``, as a sweep leaves them; one that lies
        otherwise is a setting of its own.

    Returns
    -------
    dict[str, str]
        Text by file name. Figures are means over seeds ± standard deviations.

    Raises
    ------
    ReportError
        If there is no finished run.
    """
    settings: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"**/{results.SUMMARY}")):
        run = path.parent
        place = run.parent if run.name.startswith("seed=") else run
        setting = place.relative_to(folder).as_posix()
        settings.setdefault(setting, []).append(results.read_summary(path.parent))
    if not settings:
        raise ReportError(f"no {results.SUMMARY} below {folder}")
    shown, figures = [], []
    for setting, summaries in settings.items():
        each = [[get(s) for s in summaries] for get, _ in _RUNS.values()]
        forms = [form for _, form in _RUNS.values()]
        cells = [with_spread(*pair) for pair in zip(each, forms, strict=True)]
        shown.append([setting.replace("|", "\\|"), str(len(summaries)), *cells])
        flat = [f"{figure:.6g}" for values in each for figure in spread(values)]
        figures.append([setting, len(summaries), *flat])
    pairs = [name for column in _RUNS for name in (column, f"{column}, std")]
    return {
        "runs.md": markdown(["setting", "seeds", *_RUNS], shown),
        "runs.csv": comma_separated(["setting", "seeds", *pairs], figures),
    }
