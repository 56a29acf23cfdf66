"""docs/datasets.md: what it shows of Hugging Face's `datasets` and of operators holds."""

from __future__ import annotations

import doctest

import pytest
from conftest import ROOT

datasets = pytest.importorskip("datasets", reason="pip install -r requirements-test.txt")


def test_the_page_of_examples_holds(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    datasets.disable_progress_bars()
    page = ROOT / "docs" / "datasets.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 10
    assert not result.failed
