"""Two hosts and an operator's machine on a network of their own, as Linux namespaces, for tests of `ray up`; no tests here.

Nothing of it outlives the context: all processes and the network end with it, or with the test's process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from cluster_files import REPOSITORY, load

from moiety.registry.embedded_redis import server_binary
from moiety_kernels.cpu.build import built

HOST = Path(__file__).with_name("host.sh")
NEEDED = {
    "sshd": "openssh-server",
    "rsync": "rsync",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
OPERATOR = "192.0.2.1"
WAIT_S = 20.0


def missing() -> str:
    """Returns what this machine lacks for two hosts, and how to get it; empty if nothing."""
    absent = [f"{name} (Debian: apt install {package})" for name, package in NEEDED.items() if not _which(name)]
    if absent:
        return "not installed: " + ", ".join(absent)
    if os.geteuid():
        return "needs root, to make namespaces"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return f"no namespaces here: {tried.stderr.decode().strip()}" if tried.returncode else ""


@dataclass(frozen=True, slots=True)
class Network:
    """Two running hosts, and the operator's machine, from which commands run."""

    operator: int  # process id of the operator's machine
    home: Path  # the operator's home folder
    hosts: tuple[str, ...]  # addresses: the head, then the worker

    def run(self, command: Sequence[str | Path], *, timeout_s: float) -> str:
        """Runs `command` in the repository as the operator. Returns its output; raises AssertionError if it fails."""
        process = self.start(command)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"{error}:\n{output}") from None
        assert process.returncode == 0, f"{command}: {output}"
        return output

    def start(self, command: Sequence[str | Path]) -> subprocess.Popen[str]:
        """Starts `command` in the repository as the operator, with its output in a pipe."""
        environment = {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "RAY_TMPDIR": str(self.home),  # where the launcher notes which hosts it has started
            "RAY_USAGE_STATS_ENABLED": "0",
            "TERM": "dumb",
        }
        inside = ["nsenter", f"--target={self.operator}", "--net", "--mount", "env", f"--chdir={REPOSITORY}"]
        return subprocess.Popen(
            [*inside, *map(str, command)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def on(self, address: str, command: str, *, timeout_s: float = 60.0) -> str:
        """Runs `command` on the host `address` over ssh, as its user. Returns the output."""
        options = ["-q", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        key = self.home / ".ssh" / "id_ed25519"
        return self.run(["ssh", *options, "-i", key, f"moiety@{address}", command], timeout_s=timeout_s)


@contextmanager
def two_hosts(folder: Path, model: str) -> Iterator[Network]:
    """Runs the two hosts that local.yaml names, each with sshd, and with `model` where environment.sh expects it.

    Their users have no root. ~/venv is prepared with this Python's packages, because no index is within reach.
    """
    provider = load("local.yaml")["provider"]
    addresses = (provider["head_ip"], *provider["worker_ips"])
    home = folder / "operator"
    _operators_files(home)
    with ExitStack() as ends:
        # ssh takes the home folder from /etc/passwd, not from the environment.
        in_there = 'mount --bind "$0" /etc/passwd && exec cat'
        operator = ends.enter_context(_process(["unshare", "--net", "--mount", "sh", "-c", in_there, home / "passwd"]))
        _until(lambda: Path(f"/proc/{operator.pid}/comm").read_text() == "cat\n", "the operator's machine")
        network = Network(operator.pid, home, addresses)
        for command in (
            "link set lo up",
            "link add br0 type bridge",
            f"addr add {OPERATOR}/24 dev br0",
            "link set br0 up",
        ):
            network.run(["ip", *command.split()], timeout_s=10)
        for number in range(len(addresses)):
            ends.enter_context(_host(network, number, folder / f"host{number}", model))
        for address in addresses:
            _until(partial(_can_reach, network, address), f"sshd of {address}")
        yield network


@contextmanager
def _host(network: Network, number: int, folder: Path, model: str) -> Iterator[None]:
    """Runs host `number` of the network, whose files are in `folder`."""
    address, seen = network.hosts[number], (sys.base_prefix, sysconfig.get_path("purelib"))
    _prepare_home(folder / "home")
    shutil.copy(network.home / ".ssh" / "id_ed25519.pub", folder / "authorized_keys")
    namespaces = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child")
    script: list[str | Path] = ["sh", HOST, f"host{number}", address, folder, model, *seen]
    with (folder / "log").open("wb") as log, _process(["unshare", *namespaces, *script], log=log) as host:
        own = Path("/proc/self/ns/net").readlink()
        _until(lambda: Path(f"/proc/{host.pid}/ns/net").readlink() != own, f"the network of {address}")
        for command in (
            f"link add port{number} type veth peer name cable netns {host.pid}",
            f"link set port{number} master br0 up",
        ):
            network.run(["ip", *command.split()], timeout_s=10)
        for command in (f"addr add {address}/24 dev cable", "link set cable up"):
            inside = ["nsenter", f"--target={host.pid}", "--net", "ip", *command.split()]
            subprocess.run(inside, check=True, timeout=10)
        yield


def _operators_files(home: Path) -> None:
    """Makes the operator's key, and the two secrets as cluster/README.md says."""
    for name in (".ssh", ".ray", ".moiety"):
        (home / name).mkdir(parents=True, mode=0o700)
    (home / ".ray" / "auth_token").write_text(os.urandom(32).hex())
    (home / ".moiety" / "redis_password").write_text(os.urandom(32).hex())
    root = f"root:x:0:0::{home}:/bin/bash"
    (home / "passwd").write_text(f"{root}\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n")
    key = home / ".ssh" / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=10)


def _prepare_home(home: Path) -> None:
    """Makes a home folder as local.yaml says for machines without an index: packages in ~/venv, and pip's configuration."""
    scripts, libraries = home / "venv" / "bin", home / "venv" / "lib"
    packages = libraries / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for path in (scripts, packages, home / ".config" / "pip", home / ".local" / "bin"):
        path.mkdir(parents=True)
    here = sysconfig.get_path("purelib")
    # Before the packages of the new environment, among which an old setuptools may be.
    (packages / "prepared.pth").write_text(f"import sys; sys.path.insert(1, {here!r})\n")
    for name in ("pip", "ray", "serve"):
        text = Path(sys.executable).with_name(name).read_text()
        (scripts / name).write_text("#!/home/moiety/venv/bin/python\n" + text.partition("\n")[2])
        (scripts / name).chmod(0o755)
    shutil.copy(server_binary(), scripts)
    # In a file, pip takes this option for its opposite: `false` is without isolation, which would fetch setuptools.
    (home / ".config" / "pip" / "pip.conf").write_text("[global]\nno-index = true\nno-build-isolation = false\n")
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    (home / ".local" / "bin" / "python3").symlink_to(base)
    if (library := built()) is not None:
        cache = home / ".cache" / "moiety" / "kernels"
        cache.mkdir(parents=True)
        for path in (library, library.with_suffix(".txt")):
            shutil.copy(path, cache)


@contextmanager
def _process(command: Sequence[str | Path], log: IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `command`, which ends when its standard input is closed: by the context's end, or with this process."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:  # it was still starting
            process.kill()
            process.wait()


def _can_reach(network: Network, address: str) -> bool:
    try:
        network.on(address, "true")
    except AssertionError:
        return False
    return True


def _until(condition: Callable[[], bool], what: str) -> None:
    """Waits until `condition` holds. Raises AssertionError after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not there after {WAIT_S:g} s"
        time.sleep(0.05)


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
