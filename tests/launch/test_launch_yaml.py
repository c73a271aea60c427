"""The YAML files of launch/, held against what the programs that read them require."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import Any
from unittest import mock

import pytest
import yaml
from launch_helpers import LAUNCH, ROOT, environment

from distmuon.pretrain.parse import parse_command


def load(name: str) -> dict[str, Any]:
    tree = yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))
    assert isinstance(tree, dict)
    return tree


def trainer_arguments(command: str) -> list[str]:
    """Those of a dry run's command line."""
    words = shlex.split(command)
    return words[words.index("distmuon.pretrain") + 1 :]


def run_command(command: list[str], **changes: object) -> str:
    """A command of a manifest as a dry run, in the checkout."""
    done = subprocess.run(
        command,
        env=environment(DRY_RUN=1, **changes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("name", ["accelerate_ddp.yaml", "accelerate_fsdp2.yaml"])
def test_accelerate_reads_its_files_and_hands_all_on(name: str) -> None:
    """By its own loader, parser and checks: an unknown key is an error there, and what a script will see is told."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = load_config_from_file(str(LAUNCH / name))
    assert isinstance(config, ClusterConfig)
    arguments = launch_command_parser().parse_args(["--config_file", str(LAUNCH / name), "script.py"])
    with mock.patch.dict(os.environ), mock.patch("torch.cuda.is_available", return_value=True):
        arguments, _, _ = _validate_launch_command(arguments)
        variables = prepare_multi_gpu_env(arguments)
    assert (arguments.num_processes, arguments.num_machines) == (8, 1)
    assert variables["ACCELERATE_MIXED_PRECISION"] == "bf16"
    sharded = {key: value for key, value in variables.items() if key.startswith("FSDP_")}
    if name == "accelerate_ddp.yaml":
        assert sharded == {}
        return
    assert variables["ACCELERATE_USE_FSDP"] == "true"
    assert sharded["FSDP_VERSION"] == "2"
    assert sharded["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert sharded["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    assert sharded["FSDP_RESHARD_AFTER_FORWARD"] == "true"


def test_the_kubernetes_manifest_is_a_pytorchjob() -> None:
    """Fields of the CRD pytorchjobs.kubeflow.org, version v1, and what its operator looks for."""
    job = load("kubernetes_pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(job["spec"]) <= {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
    run_policy = {
        "activeDeadlineSeconds",
        "backoffLimit",
        "cleanPodPolicy",
        "schedulingPolicy",
        "ttlSecondsAfterFinished",
    }
    assert set(job["spec"]["runPolicy"]) <= run_policy
    assert job["spec"]["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    for spec in replicas.values():
        assert set(spec) == {"replicas", "restartPolicy", "template"}
        assert spec["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        (container,) = spec["template"]["spec"]["containers"]
        # the operator finds its container and its port by these names
        assert container["name"] == "pytorch"
        assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]
        assert all(isinstance(entry["value"], str) for entry in container["env"])
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize(("role", "rank"), [("Master", 0), ("Worker", 1)])
def test_the_command_of_a_pod(role: str, rank: int) -> None:
    job = load("kubernetes_pytorchjob.yaml")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    (container,) = replicas[role]["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(given["NNODES"]) == sum(spec["replicas"] for spec in replicas.values())
    # as the operator sets them, for the name of the job; here the name is no host
    operator = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456", "RANK": str(rank), "WORLD_SIZE": "2"}
    line = run_command([*container["command"], *container["args"]], **given, **operator)
    assert f"is_host={1 - rank}," in line
    for option in ("--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=127.0.0.1:23456", "--max-restarts=3"):
        assert f" {option} " in line
    parsed = parse_command(trainer_arguments(line))
    assert (parsed.resume, parsed.config.log.dir) == ("auto", "/data/runs")


def test_the_task_of_skypilot() -> None:
    """Fields of a task of SkyPilot 0.14, whose own loader took the file as well."""
    task = load("skypilot.yaml")
    fields = {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "volumes", "setup", "run", "secrets"}
    assert set(task) <= fields
    assert set(task["resources"]) <= {"accelerators", "disk_size", "infra", "use_spot", "image_id", "ports"}
    assert all(isinstance(value, str) for value in task["envs"].values())
    machine = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_TASK_ID": "sky-1"}
    for rank in (0, 1):
        variables = {**task["envs"], **machine, "SKYPILOT_NODE_RANK": rank, "SKYPILOT_NUM_GPUS_PER_NODE": 8}
        line = run_command(["bash", "-c", task["run"]], **variables)
        for option in ("--nnodes=2", "--rdzv-id=sky-1", "--rdzv-endpoint=127.0.0.1:29500", "--nproc-per-node=8"):
            assert f" {option} " in line
        assert f"is_host={1 - rank}," in line
        parsed = parse_command(trainer_arguments(line))
        assert (parsed.config.data.source, parsed.config.log.dir) == ("/shared/llama3/*.bin", "/shared/runs")
        assert parsed.resume == "auto"
