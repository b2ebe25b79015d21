"""JVMs with py4j's gateway, one per process for all environment objects that can share it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from w2sjax.envs.java import find_java

_log = logging.getLogger(__name__)
_STOP_SECONDS = 5.0
MIN_HEAP_MB = 64


def check_packages(title: str, packages: Sequence[str], extra: str) -> None:
    """Raises ImportError, saying what to install, where packages of an environment are missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the {title} environment needs the package(s) {', '.join(missing)}: "
            f"pip install -e '.[{extra}]'"
        )


def check_heap_mb(heap_mb: object) -> int:
    """A heap size that can be; ValueError otherwise."""
    if isinstance(heap_mb, bool) or not isinstance(heap_mb, int) or heap_mb < MIN_HEAP_MB:
        raise ValueError(f"heap_mb: want a whole number of at least {MIN_HEAP_MB}, got {heap_mb!r}")
    return heap_mb


class Jvm:
    """A running JVM with the jar of one simulator. Subclasses set the class attributes.

    It ends with its standard input, so also when this process is killed, and is in a process group
    of its own, so that Ctrl-C reaches Python alone. What it prints is thrown away; what it says on
    standard error goes into the error when it does not start.

    Attributes:
      title: the simulator's name in messages.
      options: JVM options besides the heap size; "{quarter}" stands for a quarter of the heap in
        MB.
    """

    title = ""
    options: tuple[str, ...] = ("-XX:+UseSerialGC",)

    def __init__(self, java: str, heap_mb: int):
        from py4j.java_gateway import GatewayParameters, JavaGateway, find_jar_path

        jar, folder = self.files()
        command = [java, f"-Xmx{heap_mb}m"]
        command += [option.format(quarter=heap_mb // 4) for option in self.options]
        command += ["-cp", os.pathsep.join((find_jar_path(), jar)), "py4j.GatewayServer"]
        command += ["--die-on-broken-pipe", "--enable-auth", "0"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            process_group=0,
        )
        port, token = self.process.stdout.readline(), self.process.stdout.readline()
        if not token.strip():
            self.process.kill()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()[-500:]
            self.stop()
            raise RuntimeError(f"{self.title}'s JVM did not start ({' '.join(command)}): {said}")
        self.gateway = JavaGateway(
            gateway_parameters=GatewayParameters(
                port=int(port), auth_token=token.decode().strip(), auto_field=True
            )
        )
        # A lost JVM is reported once, by the RuntimeError of `calling`.
        logging.getLogger("py4j").setLevel(logging.CRITICAL)
        # The jars print. Silence them before Scala takes hold of the stream.
        lang = self.gateway.jvm.java.lang
        lang.System.setOut(self.gateway.jvm.java.io.PrintStream(os.devnull))
        self.join = lang.String.join
        self.users = 0
        self.alive = True
        self._connections = self._find_connections()
        self.answer_at_once()

    def files(self) -> tuple[str, str]:
        """The simulator's jar, and the folder in which the JVM starts."""
        raise NotImplementedError

    @property
    def running(self) -> bool:
        return self.alive and self.process.poll() is None

    def _find_connections(self) -> Sequence[Any]:
        """The server's list of its connections, which py4j keeps to itself."""
        from py4j.protocol import Py4JError

        try:
            server = self.gateway.java_gateway_server
            field = server.getClass().getDeclaredField("connections")
            field.setAccessible(True)
            return field.get(server)
        except Py4JError as error:
            _log.warning("%s: long answers will each take 40 ms more: %s", self.title, error)
            return ()

    def answer_at_once(self) -> None:
        """Sets TCP_NODELAY where the JVM answers; to be called again now and then (0.7 ms), since
        py4j connects anew where threads or the garbage collector need it.

        Without it the last piece of an answer longer than py4j's buffer of 8 kB waits until the
        first is acknowledged, which takes Linux 40 ms (Nagle's algorithm and delayed
        acknowledgements).
        """
        for connection in list(self._connections):
            connection.getSocket().setTcpNoDelay(True)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Turns errors of Java and of the connection into RuntimeError; a lost JVM is ended."""
        from py4j.protocol import Py4JError, Py4JJavaError, Py4JNetworkError

        try:
            yield
        except Py4JJavaError as error:
            said = str(error.java_exception).splitlines()[0]
            if "OutOfMemoryError" in said:
                self.stop()
                said += "; raise env.options.heap_mb"
            raise RuntimeError(f"{self.title}'s simulator failed: {said}") from error
        except (Py4JNetworkError, Py4JError, OSError) as error:
            self.stop()
            raise RuntimeError(
                f"{self.title}'s JVM (process {self.process.pid}, exit code "
                f"{self.process.returncode}) gave no answer: {error}"
            ) from error

    def stop(self) -> None:
        """Ends the JVM; safe to call twice."""
        self.alive = False
        if self.process.stdin and not self.process.stdin.closed:
            if hasattr(self, "gateway"):
                self.gateway.close()
            with contextlib.suppress(OSError):  # the JVM may be gone already
                self.process.stdin.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._errors.close()


_jvms: dict[tuple[int, type[Jvm], str, int], Jvm] = {}  # by process, kind, Java and heap size
_jvms_lock = threading.Lock()


def acquire(kind: type[Jvm], heap_mb: int) -> Jvm:
    """This process's JVM of a kind and heap size, started where there is none that runs."""
    key = (os.getpid(), kind, find_java(), heap_mb)
    with _jvms_lock:
        jvm = _jvms.get(key)
        if jvm is None or not jvm.running:
            jvm = _jvms[key] = kind(key[2], heap_mb)
        jvm.users += 1
    return jvm


def release(jvm: Jvm) -> None:
    """Lets go of an acquired JVM; the last one out ends it."""
    with _jvms_lock:
        jvm.users -= 1
        if jvm.users == 0:
            jvm.stop()
            for key in [key for key, value in _jvms.items() if value is jvm]:
                del _jvms[key]
