"""What a person can set about a server. Light: the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeSettings:
    """Tokens are tokens after truncation, times are seconds, sizes are bytes.

    `threads` None: as many as the container may use. `stall`: a batch that runs longer than this counts as hung, and
    everybody who waits is told. `probe_every`: how often an idle model answers a sentence of its own, so that
    readiness means that it can.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    max_batch_tokens: int = 1024
    queue_tokens: int = 65_536
    grace: float = 20.0
    max_body_bytes: int = 4_194_304
    max_items: int = 4096
    stall: float = 20.0
    probe_every: float = 5.0

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "queue_tokens", "max_body_bytes", "max_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected at least 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: {self.threads}; expected at least 1")
        if self.grace < 0:
            raise ValueError(f"grace: {self.grace}; expected at least 0 seconds")
        for name in ("stall", "probe_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}; expected more than 0 seconds")
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port: {self.port}; expected 0 (any free port) to 65535")
