"""The launch files for clusters say what they mean to Slurm, to Kubernetes and to Regraft."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml
from safetensors.torch import load_file

from conftest import ROOT
from regraft.engine.cli import build_parser
from regraft.engine.config import load_config
from regraft.engine.training.run import train

CLUSTER = ROOT / "examples" / "cluster"


def regraft_arguments(command: list[str]) -> list[str]:
    return command[command.index("regraft.engine") + 1 :]


def option(command: list[str], name: str) -> str:
    return next(part.partition("=")[2] for part in command if part.startswith(f"{name}="))


def test_the_kubernetes_file_names_the_same_things_throughout():
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert int(option(command, "--nnodes")) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(option(command, "--nproc-per-node")) == container["resources"]["limits"]["nvidia.com/gpu"]
    first_pod = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert option(command, "--rdzv-endpoint").partition(":")[0] == first_pod
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    args = build_parser().parse_args(regraft_arguments(command))
    assert (args.command, args.config) == ("train", "run.yaml")
    from torch.distributed.run import get_args_parser

    torchrun = get_args_parser().parse_args(command[1:])
    assert torchrun.module and torchrun.training_script == "regraft.engine"


def test_the_slurm_file_shares_a_run_out_among_as_many_processes_as_there_are_gpus(make_config, tmp_path):
    """The file itself, real torchrun and a real run; `srun` and `scontrol` are stood in for on one machine. 61 rows in steps
    of 6: the last one has a single row."""
    assert subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=False).returncode == 0
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, script in (
        ("scontrol", '[ "$*" = "show hostnames a,b" ] && echo localhost && echo elsewhere'),
        ("srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"'),
    ):
        (stand_ins / name).write_text(f"#!/bin/bash\n{script}\n")
        (stand_ins / name).chmod(0o755)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    training = {"batch_size": 6, "threads": 1, "epochs": 1, "token_budget": 40, "max_grad_norm": 0.1, "timeout": 120}
    config = make_config(model={"dropout": 0.0}, data={"limit": 61}, training=training)
    train(load_config(config, [f"run={tmp_path / 'one'}"]), quiet=True)
    slurm = {"SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "77"}
    path = f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sh", config, "--set", "training.sharding=full"],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env=os.environ
        | slurm
        | {"PATH": path, "PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weights shared out among 2 processes" in done.stderr
    for file in ("best/model.safetensors", "checkpoints/step-00000011/model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("one", "run"))
        assert one.keys() == two.keys()
        assert max(float((one[k].double() - two[k].double()).abs().max()) for k in one) < 1e-6
