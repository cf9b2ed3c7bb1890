"""Several processes that are one run: joining, agreeing, failing and stopping together.

Every process runs the same program on its own devices. Process 0 writes the run folder; what it decides, the others are
told. A process that meets an error tells the others before any of them waits for it. What processes say to each other
goes through JAX's coordination service, not through the devices: it has time-outs, works from any thread, and works
before a device is used. With one process nothing here does anything, and JAX is not loaded.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# How long one process waits for another that lives but does not answer. One that died is noticed by its heartbeat.
ANSWER_SECONDS = 1800.0
SEE_SECONDS = 15.0  # within which a file of one machine is seen on the others (a network file system may lag)
LEAVE_SECONDS = 5.0  # for a farewell, where something has failed already

_uses: Counter[str] = Counter()  # how often each name was used in `exchange`: the same in every process
_lock = threading.Lock()


class FailedElsewhere(RuntimeError):
    """Another process met an error; the message names it and says which."""


class Preempted(BaseException):
    """SIGTERM: the machine is wanted back. Not an Exception, so that nothing takes it for a mistake."""


def count() -> int:
    """The number of processes of this run. Does not load JAX, nor start its backend."""
    return _state().num_processes or 1 if "jax" in sys.modules else 1


def index() -> int:
    """The number of this process, from 0. Process 0 is the one that writes."""
    return _state().process_id or 0 if "jax" in sys.modules else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return index() == 0


def cluster(environ: Mapping[str, str]) -> str | None:
    """What has started several processes, going by the environment variables; None where this one is alone.

    "slurm" (a step of several tasks), "ompi" (mpirun of Open MPI), "k8s" (an indexed Job, as those of a JobSet are) or
    "tpu" (a slice of several hosts). These are what `jax.distributed.initialize()` finds by itself.
    """
    if "SLURM_STEP_NODELIST" in environ and _number(environ, "SLURM_NTASKS") > 1:
        return "slurm"
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return "ompi"
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or _number(environ, "MEGASCALE_NUM_SLICES") > 1:
        return "tpu"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "k8s"
    if "TPU_SKIP_MDS_QUERY" not in environ and _on_tpu_machine() and len(_tpu_hosts()) > 1:
        return "tpu"
    return None


def parse(how: str) -> tuple[str, int, int]:
    """ "HOST:PORT,COUNT,INDEX" as (address of process 0, number of processes, number of this one).

    Raises ValueError where it is not of that form.
    """
    matched = re.fullmatch(r"([^\s,]+:\d+),(\d+),(\d+)", how)
    if matched is None:
        raise ValueError(
            f"--distributed {how!r}: give auto, on, off or HOST:PORT,COUNT,INDEX: the address of process 0 with a free "
            "port, the number of processes, and the number of this one, from 0; for example 10.0.0.1:9876,4,0"
        )
    address, processes, number = matched[1], int(matched[2]), int(matched[3])
    port = int(address.rsplit(":", 1)[1])
    if not 0 < port < 2**16:
        raise ValueError(f"--distributed {how!r}: {port} is no port; give one from 1 to 65535")
    if not number < processes:
        raise ValueError(
            f"--distributed {how!r}: of {processes} processes the numbers go from 0 to {processes - 1}, and {number} "
            "is not among them"
        )
    return address, processes, number


def start(how: str = "auto", *, heartbeat_seconds: int = 60, join_seconds: int = 300) -> None:
    """Joins this process to the others of its run. To be called before JAX is used for anything else.

    Args:
      how: "auto" joins where `cluster` finds that there are others, "on" always, "off" never; else as in `parse`.
      heartbeat_seconds: after so long without a sign of life a process counts as dead, and the others end.
      join_seconds: all must have come within this time; else this process ends with status 2 and says why.

    Raises:
      ValueError: `how` is malformed, or a time is not positive.
      RuntimeError: JAX cannot find the others; the message says how to name them.
    """
    for name, value in (("--heartbeat-seconds", heartbeat_seconds), ("--join-seconds", join_seconds)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    found = cluster(os.environ) if how == "auto" else None
    if how == "off" or (how == "auto" and found is None):
        return
    named: dict[str, Any] = {}
    if how not in ("auto", "on"):
        address, processes, number = parse(how)
        if processes == 1:
            return
        named = {"coordinator_address": address, "num_processes": processes, "process_id": number}
        named |= {"cluster_detection_method": "deactivate"}
        if number == 0:
            _check_free(address)
    elif (
        found == "ompi" and "OMPI_MCA_orte_hnp_uri" not in os.environ
    ):  # Open MPI 5 does not tell its address
        named = {"cluster_detection_method": "mpi4py"}
    import jax

    with _deadline(join_seconds):
        try:
            # Of the two time-outs ours is the shorter: JAX's ends the process with a stack trace of C++.
            jax.distributed.initialize(
                **named,
                heartbeat_timeout_seconds=heartbeat_seconds,
                initialization_timeout=join_seconds + 60,
            )
        except Exception as error:
            raise RuntimeError(
                f"--distributed {how}: JAX could not join the processes{f' of {found}' if found else ''} ({error}). "
                "Name them with --distributed HOST:PORT,COUNT,INDEX, or run each alone with --distributed off"
            ) from error


def exchange(what: str, value: Any, *, timeout_seconds: float = ANSWER_SECONDS) -> list[Any]:
    """The values that all processes give, by number of process.

    All must call it, those of one name in the same order. `value` is anything that JSON can hold.

    Raises RuntimeError where one has not answered within the time; on process 0 the message names it.
    """
    if count() == 1:
        return [value]
    with _lock:
        use = _uses[what]
        _uses[what] += 1
    client, milliseconds = _client(), round(timeout_seconds * 1000)
    key = f"rlhfjax/{what}/{use}"
    client.key_value_set(f"{key}/{index()}", json.dumps(value))
    missing = 0  # whom this process waits for
    try:
        if is_first():
            values = []
            for missing in range(count()):  # noqa: B007  (read where it fails)
                values.append(json.loads(client.blocking_key_value_get(f"{key}/{missing}", milliseconds)))
            client.key_value_set(f"{key}/all", json.dumps(values))
        else:
            values = json.loads(client.blocking_key_value_get(f"{key}/all", milliseconds))
    except Exception as error:
        raise RuntimeError(
            f"{what}: process {missing} has not answered within {timeout_seconds:.0f} s; its own output says why "
            f"({str(error).splitlines()[0]})"
        ) from error
    if use:  # whoever answered now has read all that was said the time before
        client.key_value_delete(f"rlhfjax/{what}/{use - 1}/{index()}")
    return values


def together(what: str, act: Callable[[], T]) -> T:
    """`act()`, on every process. An error on one is an error on all, and none waits for one that has given up.

    Raises the error of this process's own `act`, or `FailedElsewhere` that names the processes and their errors.
    """
    if count() == 1:
        return act()
    try:
        value, error = act(), None
    except (Exception, SystemExit) as caught:
        value, error = None, caught
    answers = exchange(what, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [f"process {number}: {answer}" for number, answer in enumerate(answers) if answer is not None]
    if failed:
        raise FailedElsewhere("; ".join(failed))
    return value  # pyright: ignore[reportReturnType]


def from_first(what: str, act: Callable[[], T]) -> T:
    """`act()` on process 0 alone; what it returns (anything that JSON can hold) and what it raises go to all.

    On the others an error is a `FailedElsewhere`.
    """
    if count() == 1:
        return act()
    value = error = None
    if is_first():
        try:
            value = act()
        except (Exception, SystemExit) as caught:
            error = caught
    said = [value, None if error is None else f"{type(error).__name__}: {error}"]
    value, message = exchange(what, said if is_first() else None)[0]
    if error is not None:
        raise error
    if message is not None:
        raise FailedElsewhere(f"process 0: {message}")
    return value


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError on every process, with the names and both values, where `values` are not the same on all."""
    text = json.dumps(values, sort_keys=True, default=str)
    if len(set(exchange(f"{what} in short", hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    first, *others = exchange(what, json.loads(text))
    differing = [
        f"{key}: {first.get(key)} on process 0, {other.get(key)} on process {number}"
        for number, other in enumerate(others, start=1)
        for key in sorted({*first, *other})
        if first.get(key) != other.get(key)
    ]
    lines = "\n  ".join(differing)
    raise ValueError(
        f"{what} differs between the processes of one run:\n  {lines}\n"
        "Start all with the same; for runs of their own give --distributed off"
    )


def all_see(folder: Path) -> None:
    """Raises on every process where one does not see `folder` as process 0 does; the message names that process."""
    if count() == 1:
        return

    def put() -> str:
        token = folder / f".seen-{secrets.token_hex(8)}"
        token.touch()
        return token.name

    name = from_first("a file to be seen", put)
    try:
        together("a file seen", lambda: wait_to_see(folder / name))
    finally:
        if is_first():
            (folder / name).unlink(missing_ok=True)


def wait_to_see(path: Path) -> None:
    """Returns once `path`, made by process 0, is there. Raises FileNotFoundError where it does not come."""
    end = time.monotonic() + (0.0 if is_first() else SEE_SECONDS)
    while not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(
                f"{path.parent} is not the folder that process 0 made on {_state().coordinator_address}: the folder of "
                "a run must lie on a file system that all machines share (--run-dir)"
            )
        time.sleep(0.05)


def leave(status: int) -> int:
    """Ends this process's part in the run; `status` is its exit status, returned where it is alone.

    Where several have failed, this is the end of the process: waiting for others at exit, as JAX does, may be for ever.
    """
    if count() == 1:
        return status
    import jax

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    farewell = threading.Thread(target=_shut_down, args=(jax.distributed.shutdown,), daemon=True)
    farewell.start()
    farewell.join(LEAVE_SECONDS if status else None)
    if status:
        os._exit(status)
    return status


@contextlib.contextmanager
def heed_sigterm() -> Iterator[None]:
    """While it lasts SIGTERM raises `Preempted`, but lets a step end within `finishing_steps`.

    With several processes the signal goes to JAX, which tells all; `preempted` says when to stop.
    """
    if count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _notice.clear()


@contextlib.contextmanager
def finishing_steps() -> Iterator[None]:
    """While it lasts SIGTERM is only noted; whoever asks `preempted` after each step must then stop."""
    global _in_steps
    _in_steps = True
    try:
        yield
    finally:
        _in_steps = False


def preempted() -> bool:
    """Whether to save and stop now. To be asked after every step, by all processes; all hear yes after the same one."""
    if count() == 1:
        return _notice.is_set()
    from jax.experimental import multihost_utils

    with _lock:
        _uses["steps"] += 1  # over all stages: JAX needs a number that only grows
        steps = _uses["steps"]
    return multihost_utils.reached_preemption_sync_point(steps)


_notice = threading.Event()
_in_steps = False


def _on_sigterm(number: int, frame: Any) -> None:
    del number, frame
    _notice.set()
    if not _in_steps:
        raise Preempted


def _state() -> Any:
    """JAX's own record of the processes. Public functions tell the same, but start the backend first."""
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    client = _state().client
    if client is None:
        raise RuntimeError("there are several processes, but jax.distributed.initialize() was not called")
    return client


def _shut_down(shutdown: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):  # the others may be gone
        shutdown()


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "").strip()
    return int(text) if text.isdecimal() else 0


def _on_tpu_machine() -> bool:
    devices = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def _tpu_hosts() -> list[str]:
    """The hosts of this slice, as the metadata server of Google's machines tells; none where there is no such."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode().split(",")
    except OSError:
        return []


def _check_free(address: str) -> None:
    """Raises OSError where the port is taken: JAX would crash."""
    port = int(address.rsplit(":", 1)[1])
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise OSError(
                f"--distributed {address}: port {port} of this machine cannot be used ({error.strerror}); choose "
                "another, the same for all processes"
            ) from None


@contextlib.contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    """Ends the process, with a clear error, where the block has not ended within the time."""

    def give_up() -> None:
        address = str(_state().coordinator_address)
        try:
            host, port = address.rsplit(":", 1)
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            cause = f"not all of them have come to {address}; start the others, each with a number of its own"
        except (OSError, ValueError) as error:
            cause = (
                f"process 0 cannot be reached at {address} ({error}); start it, or name an address and a port that "
                "this machine can reach"
            )
        print(
            f"error: this process and the others have not met within {seconds} s: {cause} "
            "(--distributed HOST:PORT,COUNT,INDEX; --join-seconds waits longer)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
