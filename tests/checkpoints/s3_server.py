"""An S3 server on loopback, which can go away and come back with all that it holds."""

from __future__ import annotations

import time
from collections.abc import Iterator

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

BUCKET = "bucket"


class Server:
    """moto holds its buckets in this process, so they outlive the listening socket."""

    def __init__(self) -> None:
        """Listen on any free port."""
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen, on the same port as before."""
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def stop(self) -> None:
        """Refuse connections from now on."""
        self.server.stop()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def s3(monkeypatch) -> Iterator[Server]:
    """A server with an empty bucket, and the environment that leads every S3 client to it."""
    server = Server()
    environment = {
        "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "a-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.filesystem("s3").mkdir(BUCKET)
    yield server
    fsspec.filesystem("s3").rm(BUCKET, recursive=True)
    server.stop()


def wait_until(condition, seconds: float = 30.0) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
