"""The README's Python runs and prints what it says."""

import re
from typing import Any

import pytest

from tests.conftest import ROOT


def test_python_examples(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    names: dict[str, Any] = {}
    exec(blocks, names)  # pylint: disable=exec-used
    printed = capsys.readouterr().out.split("\n")
    said = re.findall(r"^print\(.*#\s*(.*)$", blocks, re.M)
    assert len(said) == 3
    for line, number in zip(printed, said, strict=False):
        if number[0].isdigit():
            assert f"{float(line):.4f}" == number


def test_commands_name_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for experiment in re.findall(r"experiment=(\w+)", text):
        assert (ROOT / f"conf/experiment/{experiment}.yaml").exists()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
