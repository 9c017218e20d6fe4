"""RayReport without Ray. tests/cluster/test_ray.py has a real one."""

from __future__ import annotations

import pytest

from loopkit.errors import MissingExtraError
from loopkit.hooks import RayReport, ray_report


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(ray_report, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'ray': pip install 'loopkit-torch\[ray\]'"):
        RayReport()
