"""The page on exports with its ONNX part, where the packages for that are installed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.docs.pages import DOCS, blocks


@pytest.mark.filterwarnings("ignore")  # of the exporter, about torch itself
def test_the_onnx_file_of_the_page_gives_the_outputs_of_the_task(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs pip install onnx onnxscript onnxruntime")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(DOCS / "export.md"):
        if block.language == "python":
            exec(compile(block.text, "export.md", "exec"), found)
    (given,) = found["session"].get_inputs()
    assert given.shape == ["batch", 4]
    assert found["scores"].shape == (9, 2)
