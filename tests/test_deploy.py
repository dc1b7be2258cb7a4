"""What deploy/ can be held to without a cluster: its files parse, name what exists, and give commands that es-engine
and Ray understand. Its shell scripts run with stand-ins for the programs they call."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray._private import utils as ray_utils
from ray.scripts.scripts import cli as ray_cli
from typer.main import get_command

from es_engine.cli import app
from es_engine.config import load_comparison, load_config

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
IMAGE_HOME = "/home/engine"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
README = (DEPLOY / "README.md").read_text()
SBATCH = (DEPLOY / "slurm/train.sbatch").read_text()
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SCRIPTS = [*sorted(DEPLOY.glob("*.sh")), *sorted(ROOT.glob("scripts/*.sh")), DEPLOY / "slurm/train.sbatch"]
PROGRAMS = {
    "es-engine": "es-engine",
    "ray": "ray",
    **dict.fromkeys(("train-or-resume", "train_or_resume.sh", "train.sbatch"), "train-or-resume"),
}
PROGRAM = re.compile(rf"(?:^|(?<=[\s/]))({'|'.join(map(re.escape, PROGRAMS))})\s+(?=(.*))")
END = re.compile(r"\s(?:&|\|\||2>)|;")
OTHERS = ("sky", "rsync", "kubectl", "helm", "docker build")  # whose arguments may be called es-engine


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def pinned(package: str) -> str:
    """The version in requirements/cpu.txt."""
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements/cpu.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


# Commands


def logical_lines(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def texts() -> Iterator[tuple[str, str]]:
    """Every piece of shell in the folder, by where it is."""
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        yield "README.md", block
    for script in SCRIPTS:
        yield script.name, script.read_text()
    yield "skypilot/train.yaml", load(DEPLOY / "skypilot/train.yaml")["run"]
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] == "RayJob":
                yield path.name, document["spec"]["entrypoint"]
    for service in load(DEPLOY / "compose.yaml")["services"].values():
        if isinstance(service.get("command"), str):
            yield "compose.yaml", service["command"]
        if "healthcheck" in service:
            yield "compose.yaml", shlex.join(service["healthcheck"]["test"][1:])
    yield "Dockerfile", shlex.join(yaml.safe_load(re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[-1]))


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """(where, program, arguments) of every command line of es-engine and Ray; shell variables are 1."""
    for where, text in texts():
        for line in logical_lines(text):
            if line.lstrip().startswith(("#", *OTHERS)):
                continue
            plain = re.sub(r"\$\{?\w+\}?", "1", line.replace('.sh "$@"', ".sh 1 1").replace('"$@"', ""))
            for program, rest in PROGRAM.findall(plain):
                yield where, PROGRAMS[program], shlex.split(END.split(rest)[0], comments=True)


def parse(command: Any, arguments: list[str]) -> dict[str, Any]:
    """The parameters of a command line. Raises an error of click's for one that is not understood."""
    while hasattr(command, "commands"):
        command = command.commands[arguments[0]]
        arguments = arguments[1:]
    return command.make_context(command.name, arguments).params


def parse_es_engine(arguments: list[str]) -> None:
    """Also loads the config that the command names, with its overrides."""
    given = parse(get_command(app), arguments)
    config = str(given.get("config") or "").replace(f"{IMAGE_HOME}/", "")
    if config.startswith("configs/comparisons/"):
        load_comparison(ROOT / config, given["overrides"] or [])
    elif config.startswith("configs/"):
        load_config(ROOT / config, given["overrides"] or [])
    else:
        assert config in {"", "1"}, config


COMMANDS = list(commands())


@pytest.mark.parametrize(("where", "program", "arguments"), COMMANDS, ids=[f"{w}: {p} {a[:2]}" for w, p, a in COMMANDS])
def test_every_command_is_understood(where: str, program: str, arguments: list[str]) -> None:
    if program == "ray":
        parse(ray_cli, arguments)
    elif program == "es-engine":
        parse_es_engine(arguments)
    else:
        run, config, *rest = arguments
        parse_es_engine(["train", config, "--run-dir", run, *rest])


def test_commands_are_found_in_every_place() -> None:
    files = {path.name for path in MANIFESTS if path.name.startswith("rayjob")}
    files |= {"README.md", "train.sbatch", "train_or_resume.sh", "skypilot/train.yaml", "compose.yaml", "Dockerfile"}
    assert {where for where, _, _ in COMMANDS} == files


@pytest.mark.parametrize("wrong", [["train", "configs/countdown_tiny.yaml", "--rundir", "x"], ["trian", "x"]])
def test_a_command_that_does_not_exist_is_found(wrong: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such option|trian"):
        parse_es_engine(wrong)


def test_the_page_names_files_that_exist() -> None:
    inside = re.findall(r"`((?:kubernetes/|slurm/|skypilot/|compose)[\w./-]*)`", README)
    named = {f"deploy/{name}" for name in inside} | set(re.findall(r"(?<![\w/])deploy/[\w./-]*\w", README))
    assert len(named) > 10
    assert [name for name in named - {"deploy/.env"} if not (ROOT / name).exists()] == []
    manifests = re.findall(r"[`/]((?:ray\w+)-[\w-]+\.yaml)", README)
    assert set(manifests) == {path.name for path in MANIFESTS}


# The image


def test_the_image_is_made_of_files_that_exist_and_are_let_in() -> None:
    let_in = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    sources = [source for line in copies for source in line.split()]
    assert set(sources) == set(let_in)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert all(os.access(ROOT / source, os.X_OK) for source in sources if source.endswith(".sh"))


def test_base_images_are_pinned_and_stages_exist() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    names = {name for _, name in stages}
    bases = {base for base, _ in stages} - names
    assert len(bases) == 2
    assert all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)
    assert {"cpu", "cuda", *re.findall(r"COPY --from=(\S+)", DOCKERFILE)} <= names
    for stage in ("cpu", "cuda"):
        text = re.split(r"^FROM ", DOCKERFILE.partition(f" AS {stage}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
        assert "USER engine" in text


@pytest.mark.parametrize("names", [("cpu", "cluster"), ("cuda",)])
def test_the_nodes_of_a_cluster_have_what_ray_asks_for(names: tuple[str, ...]) -> None:
    locked: dict[str, list[str]] = {}
    for name in names:
        for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines():
            if pin := re.match(r"([\w.-]+)==(\S+)", line):
                package, version = pin.groups()
                locked.setdefault(package.lower().replace("_", "-"), []).append(version)
    assert locked["ray"] == [pinned("ray")]
    for requirement in map(Requirement, requires("ray") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": "default"}):
            versions = locked[requirement.name.lower().replace("_", "-")]
            assert any(requirement.specifier.contains(version) for version in versions), requirement


# Compose


def test_the_services_are_whole() -> None:
    compose = load(DEPLOY / "compose.yaml")
    services = compose["services"]
    assert set(services) == {"head", "worker", "prometheus", "grafana"}
    for service in services.values():
        assert re.search(r":(v?\d+\.\d+\.\d+|\$\{TARGET:-cpu\})$", service["image"])
        assert set(service.get("depends_on", [])) <= set(services)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if not source.startswith("./"):
                assert source in compose["volumes"]
            elif (DEPLOY / Path(source).parts[0]).is_dir():
                assert (DEPLOY / source).exists(), source
    assert services["prometheus"]["network_mode"] == "service:head"
    assert (DEPLOY / services["head"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / services["head"]["build"]["dockerfile"]).is_file()
    assert set(load(DEPLOY / "compose.gpu.yaml")["services"]) <= set(services)


@pytest.mark.parametrize("memory", [2e9, 16e9, 64e9, 2e12])
def test_rays_object_store_has_room_in_the_services_shared_memory(
    memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has not, Ray puts it on the disk, which is slow, or does not start."""
    services = load(DEPLOY / "compose.yaml")["services"]
    sizes = {services[name]["shm_size"] for name in ("head", "worker")}
    (size,) = (int(size.removesuffix("gb")) << 30 for size in sizes)
    monkeypatch.setattr(ray_utils, "get_shared_memory_bytes", lambda: size)
    assert ray_utils.resolve_object_store_memory(int(memory)) <= size


def test_prometheus_asks_where_the_page_has_a_run_serve_its_metrics() -> None:
    file = DEPLOY / "prometheus/prometheus.yml"
    if not file.is_file():
        pytest.skip("deploy/prometheus is not there")
    targets = [each["targets"] for job in load(file)["scrape_configs"] for each in job["static_configs"]]
    ports = re.findall(r"telemetry\.prometheus_port=(\d+)", README)
    assert targets == [[f"127.0.0.1:{port}"] for port in ports]


# Kubernetes


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_has_what_kuberay_asks_for(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    claims = {each["metadata"]["name"] for each in documents if each["kind"] == "PersistentVolumeClaim"}
    ((kind, spec),) = [(each["kind"], each["spec"]) for each in documents if each["apiVersion"] == "ray.io/v1"]
    cluster = spec["rayClusterSpec"] if kind == "RayJob" else spec
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    image = "es-engine:cuda" if "h100" in path.name else "es-engine:cpu"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        ray_options = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        parse(ray_cli, ["start", "--head", *ray_options])
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == image
        assert container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        named = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in volumes.values()
            if len(volume) > 1 and "persistentVolumeClaim" in volume
        }
        assert named <= claims
        assert pod["securityContext"]["runAsUser"] == int(re.findall(r"--uid (\d+)", DOCKERFILE)[0])
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus == ("8" if "h100" in path.name else None)


# Scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_clean_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if (checker := shutil.which("shellcheck")) is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([checker, script], check=True)


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder of programs that write down how they are called; `es-engine` says 130 when it is interrupted."""
    folder = tmp_path / "bin"
    folder.mkdir()
    record = f'echo "$(basename "$0") $*" >> {tmp_path}/calls\n'
    programs = {
        "scontrol": '[ "$1" != show ] || printf "node%s\\n" $(seq 20000)\n',  # more than a pipe holds
        "srun": "exec sleep 30\n",
        "ray": '[ "$1" = health-check ] || exec sleep 30\n',
        "python": "echo secret\n",
        "es-engine": 'trap "exit 130" TERM\n[ -z "$HANG" ] || for _ in $(seq 300); do sleep 0.1; done\n',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{record}{body}")
        (folder / name).chmod(0o755)
    return folder


def environment(stand_ins: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{stand_ins}:/usr/bin:/bin", "HANG": "", "SLURM_JOB_NODELIST": "node[1-2]", **more}


def calls(stand_ins: Path, program: str) -> list[str]:
    lines = (stand_ins.parent / "calls").read_text().splitlines()
    return [line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} ")]


def test_a_run_is_begun_once_and_gone_on_with_after_that(stand_ins: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    command = [DEPLOY / "train_or_resume.sh", run, "c.yaml", "--set", "pool.address=auto"]
    subprocess.run(command, check=True, env=environment(stand_ins))
    run.mkdir()
    (run / "config.yaml").touch()
    subprocess.run(command, check=True, env=environment(stand_ins))
    assert calls(stand_ins, "es-engine") == [f"train c.yaml --run-dir {run} --set pool.address=auto", f"resume {run}"]


def slurm_job(stand_ins: Path, **more: str) -> subprocess.Popen[bytes]:
    command = ["bash", DEPLOY / "slurm/train.sbatch", "runs/x", "c.yaml"]
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "64", **more}
    return subprocess.Popen(command, cwd=ROOT, env=environment(stand_ins, **slurm), start_new_session=True)


def test_the_slurm_script_trains_on_all_its_nodes(stand_ins: Path) -> None:
    job = slurm_job(stand_ins)
    assert job.wait(30) == 0
    head, others = calls(stand_ins, "srun")
    assert "--cpus-per-task=64 --nodelist=node1 ray start --head --block --port=22345" in head
    assert "--ntasks=1 --cpus-per-task=64 --exclude=node1 ray start --block --address=node1:22345" in others
    assert all("--num-cpus=64" in step for step in (head, others))
    assert calls(stand_ins, "python")[-1] == "deploy/wait_for_nodes.py 2"
    assert calls(stand_ins, "es-engine") == ["train c.yaml --run-dir runs/x --set pool.address=auto"]
    assert calls(stand_ins, "scontrol") == ["show hostnames node[1-2]"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_slurm_job_is_queued_again_when_its_time_is_up_and_not_when_it_is_cancelled(
    stand_ins: Path, number: signal.Signals
) -> None:
    assert f"#SBATCH --signal=B:{signal.SIGUSR1.name.removeprefix('SIG')}@" in SBATCH
    job = slurm_job(stand_ins, HANG="1")
    deadline = time.monotonic() + 30
    while not (stand_ins.parent / "calls").exists() or not calls(stand_ins, "es-engine"):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)  # the traps of the script and of the stand-in
    if number == signal.SIGUSR1:
        job.send_signal(number)
        assert job.wait(30) == 130
        assert calls(stand_ins, "scontrol")[-1] == "requeue 12345"
    else:  # which all of a job's processes are sent
        os.killpg(job.pid, number)
        assert job.wait(30) == -number
        assert calls(stand_ins, "scontrol") == ["show hostnames node[1-2]"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_skypilot_task_trains_on_its_first_node(rank: str, stand_ins: Path) -> None:
    task = load(DEPLOY / "skypilot/train.yaml")
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": rank, "SKYPILOT_NUM_NODES": "2"}
    home = {"HOME": str(stand_ins.parent), "RAY_AUTH_TOKEN": "secret"}
    (stand_ins.parent / "es-engine").mkdir()
    (stand_ins.parent / "es-engine/bin").symlink_to(stand_ins)
    if rank == "1":
        (stand_ins / "ray").write_text((stand_ins / "ray").read_text().replace("exec sleep 30", "exit 1"))
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=ROOT, env=environment(stand_ins, **sky, **home, **task["envs"])
    )
    assert done.returncode == 0
    if rank == "1":
        assert calls(stand_ins, "ray")[-1] == "start --block --address=10.0.0.1:6379"
        return
    assert calls(stand_ins, "python") == ["deploy/wait_for_nodes.py 2"]
    (trained,) = calls(stand_ins, "es-engine")
    run = f"{stand_ins.parent}/runs/countdown_qwen2.5-3b"
    assert trained == f"train {task['envs']['CONFIG']} --run-dir {run} --set pool.address=auto --set pool.workers=auto"
    load_config(ROOT / task["envs"]["CONFIG"])
