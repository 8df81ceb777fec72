"""A launch where others schedule: a JobSet for GKE, a script for SLURM.  Starts no JAX.

Both run what a TPU VM runs: host_setup.sh, then `python -m gpt_jax.launch.host run`, whose exit
codes say what is worth another start (docs/reliability.md).
"""

import shlex
from collections.abc import Sequence
from typing import Any

from gpt_jax.launch.group import INTERRUPTED, USER_MISTAKE
from gpt_jax.launch.job import Job
from gpt_jax.launch.target import MOUNTS, Target

_MOST_RESTARTS = 100
_JOB = "/job"  # in a pod


def jobset(target: Target, job: Job, archive: str, image: str) -> dict[str, Any]:
    """A JobSet (jobset.x-k8s.io) with one job a slice and one pod a host; JSON is YAML too.

    A pod that ends with USER_MISTAKE fails the whole at once, any other failure starts it again.

    Args:
      target: Its name, slices, spot and secrets count.
      job: What every pod runs.
      archive: Where a pod sees the archive of the code.
      image: Of the pods: a Linux with bash, git and Python 3.
    """
    shape, hosts = target.shape, target.hosts_per_slice
    text = "\n".join(
        (
            "set -euo pipefail",
            f"mkdir -p {_JOB} && tar -xzf {shlex.quote(archive)} -C {_JOB}",
            # The buckets are mounted by the cluster, so none is named here.
            f"bash {_JOB}/code/gpt_jax/launch/host_setup.sh tpu {MOUNTS}",
            f"cd {_JOB}/code && exec ../venv/bin/python -m gpt_jax.launch.host run ..",
        )
    )
    container: dict[str, Any] = {
        "name": "train",
        "image": image,
        "command": ["bash", "-c", text],
        "resources": {"limits": {"google.com/tpu": target.chips_per_host}},
        "volumeMounts": [{"name": b, "mountPath": f"{MOUNTS}/{b}"} for b in job.buckets],
    }
    if target.secrets:
        container["envFrom"] = [{"secretRef": {"name": target.name}}]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": target.generation.gke,
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, shape.shape)),
    }
    selector |= {"cloud.google.com/gke-spot": "true"} if target.spot else {}
    pod = {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
        "spec": {
            "restartPolicy": "Never",
            "nodeSelector": selector,
            "terminationGracePeriodSeconds": 120,
            "containers": [container],
            "volumes": [_volume(bucket) for bucket in job.buckets],
        },
    }
    mistake = {"containerName": "train", "operator": "In", "values": [USER_MISTAKE]}
    one = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistake}]},
        "template": pod,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": target.name,
            # A slice is one node pool, and belongs to one job.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": _MOST_RESTARTS,
                "rules": [
                    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": target.slices, "template": {"spec": one}}
            ],
        },
    }


def _volume(bucket: str) -> dict[str, Any]:
    options = "implicit-dirs,rename-dir-limit=1000000,metadata-cache:ttl-secs:0"
    attributes = {"bucketName": bucket, "mountOptions": options}
    driver = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
    return {"name": bucket, "csi": driver}


def slurm_script(
    name: str, folder: str, nodes: int, gpus_per_node: int, secrets: Sequence[str] = ()
) -> str:
    """A script for `sbatch`: one process for each GPU, started again when its job is preempted.

    Args:
      name: Of the job.
      folder: That all nodes share; the archive was unpacked there.
      nodes: How many.
      gpus_per_node: Of each; 0: one process a node, on its CPUs.
      secrets: Names of variables that the job inherits from who submits it.
    """
    here = shlex.quote(folder)
    python = f"{here}/venv/bin/python"
    asked = [f"#SBATCH --gpus-per-node={gpus_per_node}"] if gpus_per_node else []
    needed = [f': "${{{variable}:?is not set where sbatch was called}}"' for variable in secrets]
    setup = ["bash", f"{folder}/code/gpt_jax/launch/host_setup.sh"]
    setup += ["gpu" if gpus_per_node else "", MOUNTS]
    return "\n".join(
        (
            "#!/usr/bin/env bash",
            f"#SBATCH --job-name={name}",
            f"#SBATCH --nodes={nodes}",
            f"#SBATCH --ntasks-per-node={gpus_per_node or 1}",
            *asked,
            f"#SBATCH --output={name}-%j.log",
            "#SBATCH --open-mode=append",
            "#SBATCH --requeue",
            "# A run that is about to lose its nodes has two minutes to save.",
            "#SBATCH --signal=TERM@120",
            "set -uo pipefail",
            *needed,
            f"{shlex.join(setup)} || exit 1",
            f"cd {here}/code",
            "code=0",
            # One task's end ends the others, which would wait for it for ever.
            f"srun --kill-on-bad-exit=1 {python} -m gpt_jax.launch.host run {here} || code=$?",
            f"if [ $code -eq {INTERRUPTED} ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt "
            f"{_MOST_RESTARTS} ]; then",
            "  # It was interrupted and has saved: the same job goes on when there is room.",
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            "exit $code",
            "",
        )
    )
