"""What lies in deploy/ fits what it deploys: flags parse, ports agree, probes exist, variables are
read. Manifests are checked against Kubernetes' own schemas, scripts are run with stand-ins for the
programs of a cluster."""

import ast
import importlib.util
import io
import os
import re
import shlex
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dockerfile_parse
import kubernetes_validate
import pytest
import typer
import yaml
from starlette.routing import Route

from jengine.cluster import VARIABLES
from jengine.config import EngineConfig
from jengine.server import __main__ as cli
from jengine.server import supervisor
from jengine.server.cli_options import EngineFlags
from jengine.server.http_server import create_app
from jengine.server.metrics import ServerMetrics
from jengine.server.replica_flags import ReplicaFlags, replicas_of
from jengine.server.replicas import Replica, SupervisorSettings
from jengine.server.server_flags import ServerFlags
from jengine.server.settings import ServerSettings
from jengine.server.state import ServerState
from jengine.server.supervisor import Supervisor

REPO = Path(__file__).resolve().parents[1]
DEPLOY = REPO / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*"))
SBATCH = DEPLOY / "slurm" / "replicas.sbatch"
KUBERNETES = "1.33.0"
LWS = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "leader"}
LINGER_SECONDS = 5  # what an exit takes beyond the drain


@dataclass(frozen=True)
class Serve:
    """A command line of ours, parsed by our parser."""

    settings: ServerSettings
    replicas: tuple[Replica, ...]
    supervisor_port: int | None

    @property
    def ports(self) -> set[int]:
        ports = {r.port for r in self.replicas} | {r.grpc_port for r in self.replicas}
        return {p for p in (*ports, self.supervisor_port) if p is not None}


def parse(words: list[str]) -> Serve:
    """Words after `jengine`. Fails for flags that do not exist or do not fit."""
    assert words[0] == "serve"
    command: Any = typer.main.get_command(cli.app)
    parameters = command.commands["serve"].make_context("serve", words[1:]).params
    parameters["api_key_file"] = None  # a Secret's, which is not here

    def group(kind: type[Any]) -> Any:
        return kind(**{name: parameters[name] for name in kind.__dataclass_fields__})

    engine, server, flags = group(EngineFlags), group(ServerFlags), group(ReplicaFlags)
    flags.check_unused()
    settings = server.build()
    if not flags.data_parallel_multi_port_external_lb:
        engine.build()
        return Serve(settings, (Replica(0, settings.port or 0, settings.grpc_port, ()),), None)
    flags.supervisor_settings()
    found = replicas_of(engine, server, flags)
    return Serve(settings, found, flags.data_parallel_supervisor_port)


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield path.name, document


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Every pod template, with the name of its file."""
    found = []
    for name, document in documents():
        spec = document["spec"]
        if document["kind"] == "Deployment":
            found.append((name, spec["template"]))
        elif document["kind"] == "LeaderWorkerSet":
            templates = spec["leaderWorkerTemplate"]
            found += [(name, t) for key, t in templates.items() if key.endswith("Template")]
    return found


@pytest.fixture
def in_group(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables that the LeaderWorkerSet controller sets."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in LWS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LWS_WORKER_INDEX", "1")
    return monkeypatch


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["spec"]["containers"]
    return container


def test_manifests_have_the_shape_that_kubernetes_wants() -> None:
    kinds = []
    for name, document in documents():
        kinds.append(document["kind"])
        if document["kind"] != "LeaderWorkerSet":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            continue
        # A custom resource has no schema there; the pods inside it do.
        group = document["spec"]["leaderWorkerTemplate"]
        assert document["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
        assert set(group) <= {"size", "restartPolicy", "workerTemplate", "leaderTemplate"}
        assert group["restartPolicy"] == "RecreateGroupOnPodRestart"
        meta = {"name": name}
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": meta}
        template["template"] = group["workerTemplate"]
        kubernetes_validate.validate(template, KUBERNETES, strict=True)
    assert {"Deployment", "Service", "LeaderWorkerSet"} <= set(kinds)
    broken = yaml.safe_load(MANIFESTS[0].read_text().split("---")[0])
    container_of(broken["spec"]["template"])["portz"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


@pytest.mark.parametrize(("name", "pod"), pods())
def test_a_pods_command_ports_and_probes_agree(
    name: str, pod: dict[str, Any], in_group: pytest.MonkeyPatch
) -> None:
    container = container_of(pod)
    serve = parse(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert set(ports.values()) == serve.ports
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[kind]["httpGet"]
        port = ports[probe["port"]]
        is_supervisor = port == serve.supervisor_port
        assert is_supervisor or port in {r.port for r in serve.replicas}
        assert probe["path"] in (supervisor_paths() if is_supervisor else server_paths())
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert grace > before + serve.settings.shutdown_timeout + LINGER_SECONDS
    for variable in container["env"]:
        assert variable["name"] in variables_that_are_read(), variable
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(arg == "--api-key-file=/keys/keys" for arg in container["args"])
    assert {"/keys", "/cache"} <= set(paths)
    # Services lead to these pods' ports by name.
    labels = pod["metadata"]["labels"]
    services = [
        document["spec"]
        for file, document in documents()
        if file == name and document["kind"] == "Service"
    ]
    assert services
    for service in services:
        assert service["selector"].items() <= labels.items()
        for port in service["ports"]:
            assert ports[port["targetPort"]] == port["port"]


def test_the_group_covers_every_rank_once(in_group: pytest.MonkeyPatch) -> None:
    (group,) = (d["spec"] for _, d in documents() if d["kind"] == "LeaderWorkerSet")
    template = group["leaderWorkerTemplate"]
    container = container_of(template["workerTemplate"])
    ranks = []
    for index in range(template["size"]):
        in_group.setenv("LWS_WORKER_INDEX", str(index))
        replicas = parse(container["args"]).replicas
        ranks += [replica.rank for replica in replicas]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == len(replicas)
    assert ranks == list(range(4))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_builds_from_what_is_here(path: Path, tmp_path: Path) -> None:
    stream: Any = io.BytesIO(path.read_bytes())  # its annotation says text, its code bytes
    steps = dockerfile_parse.DockerfileParser(fileobj=stream).structure
    by_name: dict[str, list[str]] = {}
    for step in steps:
        by_name.setdefault(step["instruction"], []).append(step["value"])
    known = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL"}
    assert set(by_name) == known | {"HEALTHCHECK", "ENTRYPOINT", "CMD", "COMMENT"}
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    copied = [word for value in by_name["COPY"] for word in value.split()[:-1]]
    ignored = (REPO / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (REPO / name).exists()
        assert f"!{name}" in ignored
    packages = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = set(packages["package-dir"].values())
    assert folders | {"pyproject.toml", project["readme"], *project["license-files"]} == set(copied)
    for extra in re.findall(r'"\.\[(\w+)\]"', path.read_text()):
        assert extra in project["optional-dependencies"]
    assert by_name["ENTRYPOINT"] == ['["jengine"]']
    assert "jengine" in project["scripts"]
    assert by_name["USER"][-1] not in ("0", "root")
    defaults = {ServerSettings().port, ServerSettings().grpc_port, 9256}
    assert set(map(int, by_name["EXPOSE"][0].split())) == defaults
    (check,) = by_name["HEALTHCHECK"]
    code = ast.literal_eval(check[check.index("CMD") + len("CMD") :].strip())[2]
    url = re.search(r"http://127.0.0.1:(\d+)(/\w+)", code)
    assert url is not None
    assert int(url[1]) == ServerSettings().port
    assert url[2] in server_paths()
    compile(code, str(path), "exec")
    for name in re.findall(r"(\w+)=", by_name["ENV"][0]):
        assert name in variables_that_are_read() | {"PYTHONUNBUFFERED"} or "NVIDIA" in name
    for value in by_name["RUN"]:
        subprocess.run(["sh", "-n", "-c", value], check=True)


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{body}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("code", "restarts", "is_requeued"),
    [(0, 0, False), (75, 0, True), (137, 3, True), (75, 10, False), (78, 0, False), (2, 0, False)],
)
def test_the_slurm_script(tmp_path: Path, code: int, restarts: int, is_requeued: bool) -> None:
    subprocess.run(["bash", "-n", SBATCH], check=True)
    stand_in(tmp_path, "srun", f"exit {code}")
    stand_in(tmp_path, "scontrol", "")
    run = subprocess.run(
        ["bash", SBATCH, "some/model", "--max-num-seqs", "7"], env=slurm(tmp_path, restarts)
    )
    assert run.returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (calls[1:] == ["scontrol requeue 42"]) == is_requeued
    words = shlex.split(calls[0])
    serve = parse(words[words.index("jengine") + 1 :])
    assert [replica.rank for replica in serve.replicas] == [0, 1, 2, 3]
    assert words[-2:] == ["--max-num-seqs", "7"]


def test_the_slurm_script_drains(tmp_path: Path) -> None:
    """The batch script gets the signal; the step gets it from there, and has time."""
    stand_in(
        tmp_path,
        "srun",
        "trap 'sleep 0.3; exit 0' TERM; touch started; while :; do sleep 0.05; done",
    )
    stand_in(tmp_path, "scontrol", "")
    with subprocess.Popen(["bash", SBATCH, "m"], env=slurm(tmp_path, 0), cwd=tmp_path) as job:
        while not (tmp_path / "started").exists():
            assert job.poll() is None
        job.send_signal(signal.SIGTERM)
        assert job.wait(10) == 0
    assert "scontrol" not in (tmp_path / "calls").read_text()


def test_the_slurm_script_asks_for_what_it_uses() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SBATCH.read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert options["gpus-per-node"] == "4"
    assert re.search(r"SLURM_GPUS_PER_NODE:-4", SBATCH.read_text())
    lead = int(options["signal"].partition("@")[2])
    assert lead > 60 + LINGER_SECONDS  # --shutdown-timeout 60


def test_the_ray_scripts_commands() -> None:
    spec = importlib.util.spec_from_file_location("replicas", DEPLOY / "ray" / "replicas.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ranks = []
    for host in range(2):
        command = module.command_of("m", 2, 3, host, ["--max-num-seqs=4"])
        assert command[1:3] == ["-m", "jengine.server"]
        ranks += [replica.rank for replica in parse(command[3:]).replicas]
    assert ranks == list(range(6))


def test_commands_in_the_documentation_parse() -> None:
    pages = [REPO / "docs" / name for name in ("deployment.md", "serving.md")]
    lines = [
        line.partition("  #")[0]
        for page in pages
        for line in page.read_text().splitlines()
        if line.startswith("jengine serve ") and "[" not in line
    ]
    assert len(lines) >= 3
    for line in lines:
        parse(shlex.split(line)[1:])


def server_paths() -> set[str]:
    state = ServerState(ServerSettings(), EngineConfig.from_kwargs("m"), ServerMetrics("m"))
    return paths_of(create_app(state).routes)


def supervisor_paths() -> set[str]:
    nobody = Supervisor((), lambda replica: [], ServerSettings(), SupervisorSettings())
    return paths_of(supervisor.create_app(nobody).routes)


def paths_of(routes: Any) -> set[str]:
    return {r.path for r in routes if isinstance(r, Route) and "GET" in (r.methods or ())}


def variables_that_are_read() -> set[str]:
    """By us, and by huggingface_hub."""
    source = (REPO / "jengine" / "config.py").read_text()
    return {*VARIABLES, *re.findall(r"environ\.get\(\"(\w+)\"", source), "HF_HOME"}


def slurm(folder: Path, restarts: int) -> dict[str, str]:
    path = f"{folder}:{os.environ['PATH']}"
    names = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(restarts)}
    return {"PATH": path, **names}
