"""A Ray cluster: joined or started, its tasks awaited, its errors turned into ours."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from surgery.errors import EngineError, SurgeryError

SECONDS = 10
"""A cluster must answer within this time."""

HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""The first bytes of every gRPC connection: HTTP/2's preface, no settings (RFC 9113, 3.4)."""
SETTINGS = 4
"""Type of the frame that answers it; the type is the fourth byte."""

ENGINES = ("local", "ray")
"""Where tasks run: in this process, or on a Ray cluster."""

RETRIES = 5
"""How often Ray restarts a task that lost its node or process."""


@contextmanager
def cluster() -> Iterator[Any]:
    """Yield the library ``ray``, connected to a running cluster, else to one started here.

    Raises:
        EngineError: the library is not installed, or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports it by default
    try:
        import ray
    except ImportError as error:
        raise EngineError(
            "`engine` ray",
            "needs the library ray",
            fix="pip install 'compact-surgery[ray]' on every machine, or leave the option out",
        ) from error
    started = not ray.is_initialized()
    if started:
        try:
            _knock(os.environ.get("RAY_ADDRESS", ""))
            ray.init(include_dashboard=False, log_to_driver=False)
        except (OSError, RuntimeError) as error:
            raise EngineError(
                "`engine` ray", "no cluster answers", found=error, fix="check RAY_ADDRESS"
            ) from error
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _knock(address: str) -> None:
    """Connect to ``host:port`` of RAY_ADDRESS once; Ray itself would try for minutes.

    Raises:
        OSError: nothing that speaks gRPC answers there within ``SECONDS``.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    import socket

    with socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") == "1":  # TLS begins with a handshake
            return
        connection.sendall(HELLO)
        answer = connection.recv(len(HELLO))
    if answer[3:4] != bytes([SETTINGS]):
        raise OSError(f"{address} is not a Ray cluster")


def task_slots(ray: Any, gpus: bool) -> tuple[int, dict[str, int]]:
    """Number of tasks that run at a time, each on a whole node or, with ``gpus``, on one GPU.

    Returns:
        The number, and the resources that each task requests.

    Raises:
        EngineError: no node has a CPU.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus and (found := int(sum(node.get("GPU", 0) for node in nodes))):
        return found, {"num_gpus": 1, "num_cpus": 1}
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise EngineError("`engine` ray", "the cluster has no CPU", fix="add a node to it")
    return len(cpus), {"num_cpus": min(cpus)}


def results(ray: Any, tasks: Mapping[Any, str], done: Callable[[str, Any], object]) -> None:
    """Call ``done`` with the name and the result of each of ``tasks`` as it ends.

    After an error, the other tasks run until this process ends. They are not cancelled: ray 2.60
    aborts the whole process if a task ends while it is cancelled.

    Raises:
        SurgeryError: a task raised it; EngineError: a task lost its node too often.
        OSError: a task raised it.
    """
    pending = dict(tasks)
    try:
        while pending:
            (first, *_), _ = ray.wait(list(pending), num_returns=1)
            done(pending[first], ray.get(first))
            del pending[first]
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, (SurgeryError, OSError)):
            raise cause from None
        if isinstance(error, ray.exceptions.RayTaskError):
            raise  # a bug of ours
        raise EngineError(
            f"`engine` ray: {pending[first]}",
            "was lost",
            found=f"{type(error).__name__} after {RETRIES} retries",
            fix="check the nodes' memory and logs, then run again",
        ) from error
