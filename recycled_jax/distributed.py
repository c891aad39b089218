"""Runs of many processes, usually one on each host."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Distributed:
    """How the hosts of a run find each other (`jax.distributed.initialize`): `coordinator` is the host:port of the
    first of `processes`, `process` the number of this one. All three are found out on Cloud TPU, Kubernetes and Slurm.
    A host that is silent for `heartbeat` seconds counts as dead, and the others end.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    heartbeat: int = 60

    def __post_init__(self) -> None:
        if self.heartbeat < 1:
            raise ValueError(f"distributed.heartbeat={self.heartbeat} must be at least 1")
        given = [value is not None for value in (self.coordinator, self.processes, self.process)]
        if any(given) and not all(given):
            raise ValueError("distributed needs coordinator, processes and process, or none of them")

    def join(self) -> None:
        """Waits for the others; before anything else is done with JAX."""
        jax.distributed.initialize(
            self.coordinator,
            self.processes,
            self.process,
            heartbeat_timeout_seconds=self.heartbeat,
            shutdown_timeout_seconds=self.heartbeat,  # of a host that has failed: what the others wait for it
        )
