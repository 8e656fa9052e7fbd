"""deploy/kubernetes: a pod's two containers as processes, under the same restrictions.

Each is process 1 of a namespace, without any capability, on a read-only file system.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml
from support import procfs
from support.echo import Echo, ask_tcp, ask_udp
from support.namespaces import needs_network, network
from support.processes import COMMAND
from support.programs import debian
from support.sandbox import SCRIPT, USER
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from process.conftest import Launch

pytestmark = pytest.mark.process

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
# What a container runtime denies by default is a longer list; this one is that of the unit file.
RESTRICTED: Final = """\
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
LimitNOFILE=1048576
UMask=0022
"""
IN_CONTAINER: Final = ["unshare", "--pid", "--fork", "--kill-child"]


def manifest(name: str) -> dict[str, Any]:
    """The first document of a file."""
    found: dict[str, Any] = next(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))
    return found


class Pod:
    """A forwarder and its `reload` container, with the volumes `run` and `config`."""

    def __init__(self, directory: Path, launch: Launch) -> None:
        self._directory = directory
        run = directory / "run"
        run.mkdir()
        os.chown(run, USER, USER)
        self._config = directory / "config"
        self._config.mkdir()
        self.text = "".join(manifest("configmap.yaml")["data"].values())
        self.text = re.sub(r'"\S+cluster\.local:(\d+)"', r'"127.0.0.1:\1"', self.text)
        self.change(self.text)
        unit = directory / "unit"
        unit.write_text(RESTRICTED)
        self._sandbox = [sys.executable, str(SCRIPT), str(unit), str(run), str(run), "--"]
        spec = manifest("deployment.yaml")["spec"]["template"]["spec"]
        self._main, self._reload = spec["containers"]
        self.forwarder = launch(
            *map(self._place, self._main["args"]), prefix=[*IN_CONTAINER, *self._sandbox]
        )
        self.reload = subprocess.Popen(
            [*IN_CONTAINER, *self._sandbox, sys.executable, *self._script()],
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _place(self, argument: str) -> str:
        return argument.replace("/etc/forwarder", str(self._config))

    def _script(self) -> list[str]:
        name, path = self._reload["command"]
        assert name == "reload-on-change"
        return [str(DEPLOY / "container" / "reload_on_change.py"), self._place(path)]

    def change(self, text: str) -> None:
        """Change the file as kubelet does: a new directory, and a link that is moved there."""
        number = len(list(self._config.iterdir()))
        version = self._config / f"..{number}"
        version.mkdir()
        (version / "forwarder.toml").write_text(text)
        link = self._config / "..new"
        link.symlink_to(version.name)
        link.rename(self._config / "..data")
        file = self._config / "forwarder.toml"
        if not file.is_symlink():
            file.symlink_to("..data/forwarder.toml")

    def probe(self, name: str) -> int:
        """The exit code of a probe."""
        program, *arguments = self._main[name]["exec"]["command"]
        assert program == "forwarder"
        command = [*self._sandbox, *COMMAND, *arguments]
        return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode

    def said(self) -> str:
        """The next line of the `reload` container."""
        assert self.reload.stdout is not None
        return self.reload.stdout.readline()

    def close(self) -> None:
        """End the `reload` container; its process 1 is a child of unshare."""
        for pid in procfs.children(self.reload.pid):
            os.kill(pid, signal.SIGTERM)
        assert self.reload.wait(30) == 0
        assert self.reload.stdout is not None
        self.reload.stdout.close()


@pytest.fixture
def pod(public_path: Path, launch: Launch) -> Iterator[Pod]:
    """See :class:`Pod`; in a network of its own, so with the ports of the manifests."""
    upstreams = [("127.0.0.1", 80), ("127.0.0.1", 81)], [("127.0.0.1", 53)]
    with network(), Echo(*upstreams):
        it = Pod(public_path, launch)
        try:
            yield it
        finally:
            it.close()


@needs_network
@debian("systemd-analyze", "setpriv", "ip")
@pytest.mark.usefixtures("pod")
def test_a_pod_serves_is_probed_follows_its_config_map_and_stops(pod: Pod) -> None:
    """A good change, a bad one, a good one again; then SIGTERM to process 1."""
    (master,) = procfs.children(pod.forwarder.pid)
    assert f"NSpid:\t{master}\t1\n" in Path(f"/proc/{master}/status").read_text()
    assert "CapPrm:\t0000000000000000\n" in Path(f"/proc/{master}/status").read_text()
    assert ask_tcp(("127.0.0.1", 8080)) == "127.0.0.1:80 saw 127.0.0.1: hello"
    assert ask_udp(("127.0.0.1", 5353)) == "127.0.0.1:53 saw 127.0.0.1: hello"
    assert pod.probe("readinessProbe") == pod.probe("livenessProbe") == 0

    assert "generation 2" in pod.said()  # it cannot know whether this one was read
    pod.change(pod.text.replace("127.0.0.1:80", "127.0.0.1:81"))
    assert pod.said() == "+0 -0 ~1 =1 rules, generation 3\n"
    assert ask_tcp(("127.0.0.1", 8080)) == "127.0.0.1:81 saw 127.0.0.1: hello"

    pod.change(pod.text.replace("upstream", "upstraem"))
    assert pod.said() == "forwarder: the configuration was rejected\n"
    assert "the rule has no upstream" in pod.said()
    assert ask_tcp(("127.0.0.1", 8080)) == "127.0.0.1:81 saw 127.0.0.1: hello"
    assert pod.probe("livenessProbe") == 0
    pod.change(pod.text)
    lines = [pod.said()]
    while "generation" not in lines[-1]:
        lines.append(pod.said())
    assert lines[-1] == "+0 -0 ~1 =1 rules, generation 4\n"

    os.kill(master, signal.SIGTERM)
    eventually(lambda: pod.forwarder.process.poll() is not None)
    assert pod.forwarder.wait() == 0
    assert pod.probe("livenessProbe") == 69
