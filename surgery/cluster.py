"""A Ray cluster as tasks need it: joined or started, waited for, its errors ours."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from surgery.errors import EngineError, SurgeryError

SECONDS = 10
"""In which a cluster must answer."""

HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""How every gRPC connection begins: HTTP/2's preface and no settings (RFC 9113, section 3.4)."""
SETTINGS = 4
"""Type of the frame that answers it, its fourth byte."""

ENGINES = ("local", "ray")
"""Where tasks run: in this process, or on a Ray cluster."""

RETRIES = 5
"""How often a task begins anew whose node or process was lost."""


@contextmanager
def cluster() -> Iterator[Any]:
    """Yield the library ``ray``, connected to the cluster around us, else to one started here.

    Raises:
        EngineError: the library is not there, or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers
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
    """Greet ``host:port`` of RAY_ADDRESS once: ray itself would try for minutes.

    Raises:
        OSError: nothing that speaks gRPC answers there within ``SECONDS``.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    import socket

    with socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") == "1":  # which begins in another way
            return
        connection.sendall(HELLO)
        answer = connection.recv(len(HELLO))
    if answer[3:4] != bytes([SETTINGS]):
        raise OSError(f"{address} is no part of a Ray cluster")


def places(ray: Any, gpus: bool) -> tuple[int, dict[str, int]]:
    """How many tasks the cluster runs at a time that take a whole node or, with ``gpus``, a GPU.

    Returns:
        Their number, and the resources that each asks for.

    Raises:
        EngineError: no node has a CPU.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus and (found := int(sum(node.get("GPU", 0) for node in nodes))):
        return found, {"num_gpus": 1, "num_cpus": 1}
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise EngineError("`engine` ray", "finds no CPU in the cluster", fix="add a node to it")
    return len(cpus), {"num_cpus": min(cpus)}


def results(ray: Any, tasks: Mapping[Any, str], done: Callable[[str, Any], object]) -> None:
    """Call ``done`` with name and result of each of ``tasks`` as it ends.

    After an error the others go on until this process ends. They are not cancelled: ray 2.60 then
    aborts the whole process where one of them ends at that moment.

    Raises:
        SurgeryError: what a task raised, or an EngineError where its nodes were lost too often.
        OSError: what a task raised.
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
