"""What the service allows: every bound on what strangers may ask of it, in one record."""

from __future__ import annotations

from dataclasses import dataclass, fields

from clipdistill.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Options:
    """The service's bounds.

    Attributes:
        body_bytes: The largest body of one request.
        buffered_bytes: The most bytes of bodies that are held at once, over all requests.
        body_seconds: How long a body may take to arrive.
        text_chars: The longest text, in characters; encoders cut texts to far less.
        inputs: The most texts and pictures of one embeddings request.
        pixels: The largest width times height of a picture, read from its header before anything is decoded.
        batch: How many texts, or pictures, of different requests are encoded together.
        window_ms: How long a batch waits for company under load, in milliseconds.
        waiting: How many texts, or pictures, may wait to be encoded; more are refused with 503.
        threads: How many threads decode thumbnails and check pictures, and how many search.
        thumbnail: The longer side of a thumbnail, in pixels.
        thumbnail_cache_bytes: How much memory finished thumbnails may take.
        hosts: The names that a request's ``Host`` may say, so that a web site whose name was pointed at this machine
            cannot read from the service (DNS rebinding); empty = any.

    Raises:
        ConfigError: For a bound that is not above 0, or a queue that cannot hold one request.
    """

    body_bytes: int = 16 << 20
    buffered_bytes: int = 256 << 20
    body_seconds: float = 30.0
    text_chars: int = 4096
    inputs: int = 256
    pixels: int = 50_000_000
    batch: int = 32
    window_ms: float = 2.0
    waiting: int = 512
    threads: int = 2
    thumbnail: int = 256
    thumbnail_cache_bytes: int = 64 << 20
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = [
            f"serve.{field.name}: must be above 0, got {getattr(self, field.name)}"
            for field in fields(self)
            if field.name not in ("hosts", "window_ms") and not getattr(self, field.name) > 0
        ]
        if not 0 <= self.window_ms <= 1000:
            faults.append(f"serve.window_ms: must be from 0 to 1000, got {self.window_ms}")
        if self.waiting < self.inputs:
            faults.append(f"serve.waiting: {self.waiting} cannot hold one request of serve.inputs {self.inputs}")
        if self.buffered_bytes < self.body_bytes:
            most = f"one body of serve.body_bytes {self.body_bytes}"
            faults.append(f"serve.buffered_bytes: {self.buffered_bytes} cannot hold {most}")
        if faults:
            raise ConfigError(faults)
