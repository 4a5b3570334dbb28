import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has a cache of its own, and a file where its stages tell what they did."""
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TINY_CALLS", str(tmp_path / "calls.txt"))
    return tmp_path / "cache"
