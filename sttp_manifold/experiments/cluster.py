"""Runs on the machines of a Dask cluster: a lost worker's runs go to another one.

joblib's own Dask backend gives results when all are there; here each comes when it is done, since a
record has to be on disk before anything else can be lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.records import Record

__all__ = ["on_cluster"]

_SECONDS_TO_CONNECT = 30
# A worker of several threads does one run at a time: runs set threads and seeds of their process.
_ALONE = threading.Lock()


def _one_at_a_time(call: Callable[..., Record], *arguments: Any) -> Record:
    with _ALONE:
        return call(*arguments)


def on_cluster(
    address: str, call: Callable[..., Record], arguments: Sequence[tuple[str, tuple[Any, ...]]]
) -> Iterator[Record]:
    """Records as they come, each once.

    Args:
        address: of the scheduler, ``tcp://host:8786``.
        call: what does a run.
        arguments: for each run its key, and what the call takes.

    Raises:
        ConfigError: ``distributed`` is not installed, there is no such scheduler, or a run lost its
            worker time and again.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise ConfigError(
            "--dask needs the package distributed, which is not installed: "
            "pip install 'sttp-manifold[dask]'"
        ) from error
    try:
        client = Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ConfigError(
            f"--dask {address}: no scheduler answers ({error}); start one with `dask scheduler`, "
            "workers with `dask worker ADDRESS --nthreads 1`"
        ) from error
    futures: dict[Any, str] = {}
    try:
        # The key is the specification's: a run is on the cluster once, whoever asks for it.
        futures = {
            client.submit(_one_at_a_time, call, *rest, key=f"sttp-{key}", pure=False): key
            for key, rest in arguments
        }
        for future in as_completed(list(futures), loop=client.loop):
            lost = future.exception()
            if isinstance(lost, ConfigError):
                raise lost
            if lost is not None:
                raise ConfigError(
                    f"the cluster gave up on run {futures[future]} ({type(lost).__name__}: "
                    f"{lost}). The runs that ended are kept; the same command goes on from here"
                )
            yield future.result()
            future.release()
    finally:
        # Runs that nobody waits for any longer are taken back.
        client.cancel(list(futures))
        client.close()
