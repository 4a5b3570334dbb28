from tests.runner.conftest import own_cache  # noqa: F401  a cache of each test's own
