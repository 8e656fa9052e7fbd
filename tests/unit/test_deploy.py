"""deploy: what other programs read is what they want to read, and fits together."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from support.programs import debian

from forwarder import __version__
from forwarder.cli.main import cli
from forwarder.config import parse
from forwarder.config.model import Dialect

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
CONTAINERFILE: Final = DEPLOY / "container" / "Containerfile"
MANIFESTS: Final = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
BIN: Final = Path(sys.executable).parent  # not resolved: of this environment
# The oldest version whose schema the tool has and that is still somewhere; and the newest.
KUBERNETES: Final = ("1.29.0", "1.37.0")
Manifest = dict[str, Any]


def extra(program: str) -> str:
    """The path of a program of the extra ``deploy``."""
    found = shutil.which(program, path=str(BIN))
    if found is None:
        pytest.skip(f"not installed: {program}; pip install --editable '.[deploy]'")
    return found


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


# -- the container image


def instructions() -> list[tuple[str, str]]:
    """Instructions and their arguments, with lines joined and without comments."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (ln.partition(" ") for ln in lines if ln)]


def test_a_linter_finds_nothing_in_the_containerfile() -> None:
    done = run(extra("hadolint"), str(CONTAINERFILE))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_containerfile_runs_no_shell() -> None:
    for name, rest in instructions():
        if name in ("RUN", "CMD", "ENTRYPOINT"):
            assert isinstance(json.loads(rest), list), (name, rest)
        if name == "HEALTHCHECK":
            assert json.loads(rest.partition(" CMD ")[2]) == ["forwarder", "status"]
        assert name not in ("ADD", "SHELL"), name


def test_the_image_is_not_root_and_stops_in_peace() -> None:
    last = dict(instructions())
    user, _, group = last["USER"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert last["ENV"] == "RUNTIME_DIRECTORY=/run/forwarder"
    assert json.loads(last["ENTRYPOINT"]) == ["forwarder"]


def test_the_base_images_are_one_that_the_package_supports() -> None:
    bases = {rest.split()[0] for name, rest in instructions() if name == "FROM"}
    (base,) = bases
    found = re.fullmatch(r"python:(3\.\d+)-slim", base)
    assert found is not None, base
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Programming Language :: Python :: {found[1]}" in project["classifiers"]


def test_what_the_image_copies_exists_and_is_sent_to_the_builder() -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for name, rest in instructions():
        if name == "COPY" and "--from=" not in rest:
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists(), source
                assert any(source.startswith(line[1:]) for line in sent if line[0] == "!"), source


# -- Kubernetes


def documents(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text()))


def everything() -> list[Manifest]:
    return [document for path in MANIFESTS for document in documents(path)]


def of_kind(*kinds: str) -> list[Manifest]:
    return [document for document in everything() if document["kind"] in kinds]


WORKLOADS: Final = of_kind("DaemonSet", "Deployment")
workload = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda it: str(it["kind"]))


def pod_of(workload: Manifest) -> Manifest:
    pod: Manifest = workload["spec"]["template"]["spec"]
    return pod


def container(workload: Manifest, name: str) -> Manifest:
    (found,) = [it for it in pod_of(workload)["containers"] if it["name"] == name]
    return dict(found)


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_manifests_are_valid(version: str) -> None:
    tool = extra("kubernetes-validate")
    done = run(tool, "--strict", "--quiet", "-k", version, *map(str, MANIFESTS))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_there_is_one_of_each_kind() -> None:
    kinds = sorted(document["kind"] for document in everything())
    assert kinds == ["ConfigMap", "DaemonSet", "Deployment", "PodDisruptionBudget", "Service"]


@workload
def test_a_selector_finds_its_own_pods_and_no_others(workload: Manifest) -> None:
    selector = workload["spec"]["selector"]["matchLabels"]
    for other in WORKLOADS:
        labels = other["spec"]["template"]["metadata"]["labels"]
        assert (selector.items() <= labels.items()) == (other is workload)


def test_the_service_leads_to_ports_of_the_deployment() -> None:
    (service,), (deployment,) = of_kind("Service"), of_kind("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    ports = {it["name"]: it["protocol"] for it in container(deployment, "forwarder")["ports"]}
    assert {p["targetPort"]: p["protocol"] for p in service["spec"]["ports"]} == ports
    (budget,) = of_kind("PodDisruptionBudget")
    assert budget["spec"]["selector"] == deployment["spec"]["selector"]


def configuration() -> str:
    (config_map,) = of_kind("ConfigMap")
    (text,) = config_map["data"].values()
    return str(text)


@workload
def test_the_ports_are_those_of_the_configuration(workload: Manifest) -> None:
    loaded = parse(configuration(), "forwarder.toml", Dialect.TOML)
    assert loaded.warnings == ()
    rules = {rule.name: (str(rule.listen), rule.protocol.value) for rule in loaded.config.rules}
    ports = container(workload, "forwarder")["ports"]
    found = {it["name"]: (f"[::]:{it['containerPort']}", it["protocol"].lower()) for it in ports}
    assert found == rules


@workload
def test_a_pod_has_the_time_that_draining_takes(workload: Manifest) -> None:
    limit = parse(configuration(), "forwarder.toml", Dialect.TOML).config.settings.drain_timeout_s
    assert limit is not None
    sleep = container(workload, "forwarder")["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep[0] == "sleep"
    assert pod_of(workload)["terminationGracePeriodSeconds"] >= int(sleep[1]) + limit + 5


@workload
def test_the_commands_of_a_pod_exist(workload: Manifest) -> None:
    main, reload = container(workload, "forwarder"), container(workload, "reload")
    assert main["args"] == ["-c", "/etc/forwarder/forwarder.toml"]
    for probe in ("livenessProbe", "readinessProbe"):
        name, command = main[probe]["exec"]["command"]
        assert name == "forwarder"
        assert command in cli.commands
    copied = [rest.split()[-1] for name, rest in instructions() if name == "COPY"]
    assert f"/usr/local/bin/{reload['command'][0]}" in copied
    assert main["image"] == reload["image"]


@workload
def test_the_image_is_of_this_version_and_the_guide_says_so(workload: Manifest) -> None:
    image = f"forwarder:{__version__}"
    assert container(workload, "forwarder")["image"] == image
    found = re.findall(r"forwarder:[0-9.]+[0-9]", (ROOT / "docs" / "deployment.md").read_text())
    assert set(found) == {image}


@workload
def test_a_pod_has_no_privilege_and_one_place_to_write_to(workload: Manifest) -> None:
    pod = pod_of(workload)
    user = int(dict(instructions())["USER"].partition(":")[0])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert {pod["securityContext"][k] for k in ("runAsUser", "runAsGroup", "fsGroup")} == {user}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["config"]["configMap"]["name"] == of_kind("ConfigMap")[0]["metadata"]["name"]
    for it in pod["containers"]:
        assert it["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {mount["name"]: mount for mount in it["volumeMounts"]}
        assert mounts["run"]["mountPath"] == "/run/forwarder"
        assert mounts["config"]["readOnly"] is True
        assert "subPath" not in mounts["config"]


# -- the system


def test_the_sysctl_settings_exist() -> None:
    lines = (DEPLOY / "sysctl.conf").read_text().splitlines()
    settings = [line.split(" = ") for line in lines if line and not line.startswith("#")]
    assert len(settings) == 5
    for key, value in settings:
        assert Path("/proc/sys", *key.split(".")).exists(), key
        assert all(number.isdigit() for number in value.split())


@debian("logrotate")
def test_logrotate_understands_its_file(tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = run("logrotate", "--debug", "--state", str(state), str(DEPLOY / "logrotate"))
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert "/var/log/forwarder/*.log /var/log/forwarder/*.json" in done.stderr


def test_podman_is_given_only_what_its_version_4_3_knows() -> None:
    """Of Debian 12, which says of `--tmpfs ...:uid=65532`: unknown mount option."""
    page = (ROOT / "docs" / "deployment.md").read_text().replace("\\\n", " ")
    (command,) = [line for line in page.splitlines() if line.startswith("podman run ")]
    assert "uid=" not in command
    assert "--tmpfs" not in command
    assert "--mount type=tmpfs,destination=/run/forwarder,tmpfs-mode=0700,U=true " in command
    (build,) = [line for line in page.splitlines() if line.startswith("podman build ")]
    assert "--format docker " in build
