"""The fixtures of the integration tests, on a GPU."""

from tests.integration.conftest import digits, flags

__all__ = ["digits", "flags"]
