"""Starts and stops the cluster's Redis on the head, and checks that it is this cluster's; run after environment.sh.

`start` keeps a Redis that answers to the cluster's password. It refuses any other server on the port, because replicas would
find it only when they register, and then fail with WRONGPASS.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from moiety.errors import FailedPrecondition, MoietyError, Unavailable
from moiety.registry.embedded_redis import server_binary

READY_S = 10.0
TIMEOUT_S = 2.0
LOG = Path("~/.moiety/redis.log")


class SharedRedis:
    """The Redis of a cluster, on this machine."""

    def __init__(self, address: str, port: int, password: str) -> None:
        self.address, self.port, self.password = address, port, password
        self.log = LOG.expanduser()

    def start(self) -> str:
        """Starts the server unless it runs, and waits until other machines can reach it. Returns what was done.

        Raises FailedPrecondition if something else has the port, Unavailable if the server does not start.
        """
        done = "keeps the Redis that runs"
        if not self._answers("127.0.0.1"):
            done = "started Redis"
            self._launch()
        if not self._answers(self.address):
            raise FailedPrecondition(
                f"Redis answers at 127.0.0.1:{self.port}, but not at {self.address}, where other machines look for it: "
                "set HEAD_ADDRESS in cluster/environment.sh to the head's address, and stop this Redis (README.md)"
            )
        return f"{done} at {self.address}:{self.port}"

    def stop(self) -> str:
        """Stops the server and waits until it is gone. Returns what was done. Raises FailedPrecondition if it is not ours."""
        if not self._answers("127.0.0.1"):
            return f"no Redis at 127.0.0.1:{self.port}"
        self._client("127.0.0.1", self.password).shutdown(nosave=True)
        return f"stopped Redis at 127.0.0.1:{self.port}"

    def _client(self, host: str, password: str | None) -> redis.Redis:
        once = Retry(NoBackoff(), 0)
        return redis.Redis(
            host, self.port, password=password, retry=once, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        )

    def _answers(self, host: str) -> bool:
        """Whether a Redis with our password listens on `host`. Raises FailedPrecondition if anything else listens there."""
        try:
            socket.create_connection((host, self.port), timeout=TIMEOUT_S).close()
        except OSError:
            return False
        try:
            with suppress(redis.AuthenticationError), self._client(host, None) as stranger:
                stranger.ping()
                raise self._foreign(host, "a Redis without a password")
            with self._client(host, self.password) as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            raise self._foreign(host, "a Redis with another password") from None
        except redis.RedisError as error:
            raise self._foreign(host, f"something that does not answer as a Redis does ({error})") from None

    def _foreign(self, host: str, what: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"REDIS_PORT = {self.port}: at {host} listens {what}. It may be left from an earlier cluster: end it "
            f"(`ss -ltnp 'sport = :{self.port}'` shows the process), or set another REDIS_PORT in cluster/environment.sh, "
            "then run `ray up` again"
        )

    def _launch(self) -> None:
        """Starts the server, which outlives this process, and waits until it answers. Raises Unavailable if it does not.

        The configuration goes through stdin, so that no process list shows the password.
        """
        addresses = " ".join(dict.fromkeys(("127.0.0.1", self.address)))
        settings = f'port {self.port}\nbind {addresses}\nrequirepass {self.password}\nsave ""\n'
        with self.log.open("wb") as log:
            server = subprocess.Popen(
                [server_binary(), "-"], stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        assert server.stdin is not None
        with server.stdin as configuration:
            configuration.write(settings.encode())
        deadline = time.monotonic() + READY_S
        while not self._answers("127.0.0.1"):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                last = self.log.read_text(errors="replace").strip().splitlines()[-2:]
                raise Unavailable(
                    f"Redis did not start on port {self.port}: {' / '.join(last)} (all of it: {self.log})"
                )
            time.sleep(0.05)


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Runs `start` or `stop` and returns the exit status."""
    if arguments not in (["start"], ["stop"]):
        print("usage: . ~/moiety/cluster/environment.sh; ~/venv/bin/python shared_redis.py start|stop", file=sys.stderr)
        return 2
    try:
        server = SharedRedis(environment["HEAD_ADDRESS"], int(environment["REDIS_PORT"]), environment["REDIS_PASSWORD"])
        print(server.start() if arguments == ["start"] else server.stop())
    except KeyError as error:
        print(f"{error} is not set: source cluster/environment.sh first", file=sys.stderr)
        return 1
    except MoietyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
