"""Replay the Dockerfile where there is no Docker: build it, run it read-only as its user, take a payment, stop it.

    python -m deploy.replay_dockerfile [--python /usr/local/bin/python3.13]        (Linux, as root)

Each stage is an overlay over this machine's own root, in a private mount namespace, so nothing outside is changed:
COPY, RUN, ENV, WORKDIR and USER are carried out as they stand in the Dockerfile. The last stage is then made
read-only but for /dev/shm, and its CMD runs as process 1 of its own, without any capability.

What this does not show: that the base image has what this machine has (its Debian, its libraries, Python 3.14), its
digest, its size, and how a container engine reads the Dockerfile.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import embedded

PROJECT = Path(__file__).resolve().parent.parent
SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "var", "run", "proc", "sys", "dev")
"""What a stage sees of this machine's root; every other folder is empty there."""
PASSED_ON = re.compile(r"PIP_.*|SSL_CERT_FILE|(https?|no)_proxy", re.IGNORECASE)
"""What a build is given of the environment: how pip reaches its packages."""
SECRET_KEY = "sk_test_0123456789abcdef"  # noqa: S105  # the sandbox's
STOP_SECONDS = 30


class Failed(Exception):
    pass


# The Dockerfile


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def read_dockerfile(text: str) -> list[Stage]:
    """Its stages, each with its instructions in order. Comments are dropped, continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    stages: list[Stage] = []
    for line in re.sub(r"\\\n", " ", lines).splitlines():
        word, _, argument = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = argument.partition(" AS ")
            stages.append(Stage(name.strip() or str(len(stages)), base.strip()))
        elif word:
            stages[-1].steps.append((word, argument.strip()))
    return stages


def command_of(argument: str) -> list[str]:
    """The words of a RUN or CMD: its JSON array, or the shell that runs its text."""
    return list(json.loads(argument)) if argument.startswith("[") else ["/bin/sh", "-c", argument]


def build_context(ignore: str) -> list[Path]:
    """The project's files that reach the build, by .dockerignore: its last pattern that matches a path decides."""
    patterns = [line.strip() for line in ignore.splitlines() if line.strip() and not line.startswith("#")]
    kept = []
    for path in sorted(PROJECT.rglob("*")):
        relative = path.relative_to(PROJECT)
        if path.is_file() and not is_ignored(relative, patterns):
            kept.append(relative)
    return kept


def is_ignored(path: Path, patterns: list[str]) -> bool:
    ignored = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!").strip("/").split("/")
        parts = path.parts[: len(wanted)]
        if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
            ignored = not pattern.startswith("!")
    return ignored


# Building


class Root:
    """The file system of one stage: an overlay over this machine's, with the chosen Python in the image's place."""

    def __init__(self, scratch: Path, name: str, base: "Root | None", python: Path) -> None:
        self.path = scratch / name / "root"
        self.upper = scratch / name / "upper"
        self.lower: str = f"{base.upper}:{base.lower}" if base else "/"
        self.env: dict[str, str] = dict(base.env) if base else {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.workdir: str = base.workdir if base else "/"
        self.user = "0"
        self.settings: dict[str, str] = {}
        self._overlay(self.lower, self.upper, self.path)
        prefix = Path(run_here(str(python), "-c", "import sys; print(sys.base_prefix)").strip())
        if prefix == Path("/usr"):
            (self.path / "usr/local/bin/python").unlink(missing_ok=True)
            (self.path / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        else:
            self._overlay(str(prefix), scratch / name / "upper-python", self.path / "usr/local")
            run_here("/usr/sbin/chroot", str(self.path), "/sbin/ldconfig")  # its libpython is in another folder now
        for folder in [each for each in self.path.iterdir() if each.is_dir() and each.name not in SYSTEM]:
            if not folder.is_symlink():
                mount("-t", "tmpfs", "-o", f"mode={'1777' if folder.name == 'tmp' else '755'}", "none", str(folder))
        mount("--rbind", "/proc", str(self.path / "proc"))
        mount("--rbind", "/dev", str(self.path / "dev"))
        mount("-t", "tmpfs", "-o", "size=64m,mode=1777", "none", str(self.path / "dev/shm"))

    def _overlay(self, lower: str, upper: Path, where: Path) -> None:
        work = upper.with_name(upper.name + "-work")
        for folder in (upper, work, where):
            folder.mkdir(parents=True, exist_ok=True)
        mount("-t", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", "overlay", str(where))

    def inside(self, path: str) -> Path:
        """Where a path of the image lies on this machine."""
        return self.path / str(Path(self.workdir, path)).lstrip("/")

    def owner(self) -> tuple[int, int]:
        """The uid and gid of USER."""
        for line in (self.path / "etc/passwd").read_text().splitlines():
            name, _, uid, gid, *_ = line.split(":")
            if self.user in (name, uid):
                return int(uid), int(gid)
        return int(self.user), 0

    def run(self, command: list[str], env: dict[str, str]) -> None:
        """A RUN: as root, in a chroot."""
        result = subprocess.run(
            ["/usr/sbin/chroot", str(self.path), "/usr/bin/env", f"--chdir={self.workdir}", *command],
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise Failed(f"RUN ended with status {result.returncode}:\n{result.stdout}")

    def sealed(self, command: list[str]) -> list[str]:
        """`command` as the container's process 1: its own processes, USER, no capability, none to be gained."""
        uid, gid = self.owner()
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--root={self.path}"]
        user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
        # An engine gives a container a /proc of its own.
        start = f"mount -t proc proc /proc && cd {shlex.quote(self.workdir)} && exec {shlex.join(user)} "
        start += "--inh-caps=-all --bounding-set=-all -- "
        return [*namespaces, "/bin/sh", "-c", start + shlex.join(command)]

    def make_read_only(self) -> None:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, where, kind, *_ = line.split()
            if Path(where).is_relative_to(self.path) and kind in ("overlay", "tmpfs") and "/dev" not in where:
                mount("-o", "remount,ro", where)


def build(stages: list[Stage], scratch: Path, python: Path) -> Root:
    context = build_context((PROJECT / ".dockerignore").read_text())
    passed_on = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    roots: dict[str, Root] = {}
    for stage in stages:
        root = roots[stage.name] = Root(scratch, stage.name, roots.get(stage.base), python)
        for word, argument in stage.steps:
            print(f"{stage.name:>6} {word} {' '.join(argument.split())[:110]}", flush=True)
            match word:
                case "RUN":
                    root.run(command_of(argument), passed_on)
                case "COPY":
                    copy(root, argument, roots, context)
                case "ENV":
                    for name, value in (pair.split("=", 1) for pair in shlex.split(argument)):
                        root.env[name] = value
                case "WORKDIR":
                    root.workdir = str(Path(root.workdir, argument))
                    root.inside(".").mkdir(parents=True, exist_ok=True)
                case "USER":
                    root.user = argument
                case "CMD" | "HEALTHCHECK" | "STOPSIGNAL" | "EXPOSE":
                    root.settings[word] = argument
                case _:
                    raise Failed(f"this replay does not know {word}")
    return roots[stages[-1].name]


def copy(root: Root, argument: str, roots: dict[str, Root], context: list[Path]) -> None:
    *sources, target = argument.split()
    if sources[0].startswith("--from="):
        other = roots[sources.pop(0).removeprefix("--from=")]
        for source in sources:
            shutil.copytree(other.inside(source), root.inside(target), symlinks=True, dirs_exist_ok=True)
        return
    for pattern in sources:
        found = [path for path in context if is_ignored(path, [pattern])]
        if not found:
            raise Failed(f"COPY {pattern}: there is no such file in the build's context")
        for path in found:
            # A folder's content is copied, a file under its own name.
            name = path.relative_to(pattern) if path != Path(pattern) and len(path.parts) > 1 else Path(path.name)
            into = root.inside(target) / name
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / path, into)


# Running


class Container:
    """The image's CMD, running."""

    def __init__(self, root: Root, env: dict[str, str], command: list[str] | None = None) -> None:
        self.root = root
        self.process = subprocess.Popen(
            root.sealed(command or command_of(root.settings["CMD"])),
            env={**root.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def first_pid(self) -> int:
        """Process 1 of the container, by its id out here."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def finish(self, within_seconds: float) -> tuple[int, str]:
        """Its exit status and all that it printed."""
        try:
            printed, _ = self.process.communicate(timeout=within_seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"it does not end within {within_seconds:g} s\n{self.kill()}") from None
        return self.process.returncode, printed

    def kill(self) -> str:
        """End all of it, and return what it printed. The kernel ends the others when process 1 ends."""
        with contextlib.suppress(IndexError, FileNotFoundError, ProcessLookupError):
            os.kill(self.first_pid(), signal.SIGKILL)
        self.process.kill()
        return self.process.communicate()[0]


def run_in(root: Root, env: dict[str, str], command: list[str], within_seconds: float = 30) -> tuple[int, str]:
    return Container(root, env, command).finish(within_seconds)


def show(root: Root, database_port: int, sandbox_url: str, port: int) -> None:
    env = {
        "DATABASE_URL": f"postgresql://paygate@127.0.0.1:{database_port}/postgres",
        "PAYSTACK_SECRET_KEY": SECRET_KEY,
        "PAYSTACK_URL": sandbox_url,
        "PUBLIC_URL": f"http://127.0.0.1:{port}",
        "PORT": str(port),
    }
    root.make_read_only()
    files = sorted(path.name for path in root.inside("/app").iterdir())
    check("it holds the product and nothing else", not {"tests", "bench", ".env", "sandbox.py"} & set(files), files)
    sizes = {name: size_of(root.inside(name)) >> 20 for name in ("/venv", "/postgresql", "/app")}
    print("      " + ", ".join(f"{name} {mib} MiB" for name, mib in sizes.items()))
    for folder in ("/", "/app", "/venv", "/tmp", "/usr/local"):  # noqa: S108  # looked at, not used
        status, said = run_in(root, env, ["touch", f"{folder}/probe"])
        check(f"{folder} cannot be written", status != 0 and "Read-only" in said, said)
    status, said = run_in(root, {"PORT": str(port)}, command_of(root.settings["CMD"]))
    check("without settings it ends and says what is missing", status == 1 and "DATABASE_URL" in said, said)

    begun = time.monotonic()
    container = Container(root, env)
    try:
        payment = [sys.executable, "deploy/take_a_payment.py", f"--paygate=http://127.0.0.1:{port}"]
        run_here(*payment, f"--sandbox={sandbox_url}", shown=True)
        print(f"      from the start of the container to a paid payment: {time.monotonic() - begun:.1f} s")
        check_process(root, container.first_pid())
        healthcheck = root.settings["HEALTHCHECK"]
        status, said = run_in(root, env, command_of(healthcheck[healthcheck.index("CMD") + 4 :]))
        check("HEALTHCHECK says healthy", status == 0, said)
        status, said = run_in(root, {**env, "PORT": "1"}, command_of(healthcheck[healthcheck.index("CMD") + 4 :]))
        check("HEALTHCHECK says unhealthy where nothing answers", status != 0, said)
        uid, gid = root.owner()
        mount("-t", "tmpfs", "-o", f"uid={uid},gid={gid},mode=700", "none", str(root.inside("/backups")))  # the volume
        status, said = run_in(root, env, ["python", "manage.py", "backup", "/backups/today"])
        check("manage.py backup dumps the database with the image's pg_dump", status == 0, said)
        status, said = run_in(root, env, ["pg_restore", "--list", "/backups/today"])
        check("and pg_restore reads that", status == 0 and "TABLE DATA public payments" in said, said)
        status, said = run_in(root, env, ["python", "manage.py", "migrate"])
        check("a second migrate finds nothing to do", status == 0 and "up to date" in said, said)
        check_stop(container, sandbox_url, port)
    except BaseException:
        print(container.kill(), file=sys.stderr)
        raise


def check_process(root: Root, pid: int) -> None:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    check("process 1 is gunicorn", any(word.endswith(b"gunicorn") for word in words), words)
    status = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    uid, _ = root.owner()
    check(f"it runs as user {uid}", status["Uid"].split() == [str(uid)] * 4 and uid != 0, status["Uid"])
    check("it has no capability", {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {0}, status)
    check("it can gain none", status["NoNewPrivs"] == "1", status)


def check_stop(container: Container, sandbox_url: str, port: int) -> None:
    """STOPSIGNAL while a request waits for the provider: it is answered, and then the container ends."""
    post(sandbox_url, "/_sandbox/configure", {"latency_seconds": 2})
    order = {"customer_name": "Jane Doe", "customer_email": "jane@example.com", "customer_phone": "+2348012345678"}
    number = signal.Signals[container.root.settings["STOPSIGNAL"]]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            post, f"http://127.0.0.1:{port}", "/api/v1/payments", {**order, "amount": 70, "location": "Abuja"}
        )
        time.sleep(0.7)
        begun = time.monotonic()
        os.kill(container.first_pid(), number)
        status, printed = container.finish(STOP_SECONDS)
        check(f"{number.name} ends it cleanly ({time.monotonic() - begun:.1f} s)", status == 0, printed)
        check("the request under way was answered", answer.result()[0] == 201, answer.result())


def post(server: str, path: str, body: object) -> tuple[int, str]:
    """Status and body; on a raw socket, for one answer and no more."""
    host, _, port = server.removeprefix("http://").partition(":")
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2].decode()


def check(what: str, is_so: bool, seen: object) -> None:
    if not is_so:
        raise Failed(f"not so: {what}\n{seen}")
    print(f"  ok  {what}", flush=True)


# The machine


def mount(*arguments: str) -> None:
    run_here("mount", *arguments)


def run_here(*command: str, shown: bool = False) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)
    if result.returncode != 0:
        raise Failed(f"{shlex.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
    if shown:
        print("".join(f"      {line}\n" for line in result.stdout.splitlines()), end="", flush=True)
    return result.stdout


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def over_tcp(folder: Path) -> Iterator[int]:
    """A port that leads to the embedded database, which listens in `folder` alone, and nobody else may enter that."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pour(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                target.sendall(content)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(folder / embedded.SOCKET))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=pour, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.close()


@contextlib.contextmanager
def sandbox(port: int) -> Iterator[str]:
    """The provider's stand-in, beside the container; its address."""
    provider_port = free_port()
    webhooks = f"http://127.0.0.1:{port}/api/v1/webhooks/paystack"
    process = subprocess.Popen(
        [sys.executable, "sandbox.py", f"--port={provider_port}", f"--webhook-url={webhooks}"],
        cwd=PROJECT,
        env={**os.environ, "PAYSTACK_SECRET_KEY": SECRET_KEY},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if process.stdout is None or "ready" not in process.stdout.readline():
            raise Failed("the sandbox does not start")
        yield f"http://127.0.0.1:{provider_port}"
    finally:
        process.terminate()
        process.wait(10)


def alone(python: Path) -> None:
    """What happens in the private mount namespace."""
    with contextlib.ExitStack() as stack:
        # Everything below is in memory and in this namespace: it is gone when the process ends.
        scratch = Path(tempfile.mkdtemp(prefix="paygate-replay-"))
        stack.callback(scratch.rmdir)
        mount("-t", "tmpfs", "-o", "mode=755", "none", str(scratch))
        stack.callback(run_here, "umount", "--recursive", "--lazy", str(scratch))
        root = build(read_dockerfile((PROJECT / "Dockerfile").read_text()), scratch, python)
        cluster = stack.enter_context(embedded.temporary())
        port = free_port()
        database_port = stack.enter_context(over_tcp(cluster.sockets))
        show(root, database_port, stack.enter_context(sandbox(port)), port)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the base image's (this one)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() != 0:
        sys.exit("replay_dockerfile: it needs Linux and root, for a mount namespace")
    if not options.alone:
        again = [sys.executable, "-m", "deploy.replay_dockerfile", f"--python={options.python}", "--alone"]
        os.execvp("unshare", ["unshare", "--mount", "--propagation=private", *again])  # noqa: S606, S607
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        alone(options.python)
    except Failed as failed:
        sys.exit(f"replay_dockerfile: {failed}")
    print("\n" + (__doc__ or "").rpartition("\n\n")[2].strip())


if __name__ == "__main__":
    main()
