"""The nodes that an autoscaler may add to a cluster, read on its head, because Ray has no interface for them.

This module runs on the head, which may lack torch: it imports only the standard library, Ray and Ray's PyYAML.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from pipelines.nodes import NodeKind


def autoscaling_config(gcs_address: str, processes: Path = Path("/proc")) -> dict[str, Any] | None:
    """Return the configuration of the autoscaler of the cluster at `gcs_address`, whose head this machine is, or None.

    The autoscaler's monitor is a process on the head, or with KubeRay a separate container. Raises OSError if
    Kubernetes does not answer.
    """
    if (config := kuberay_config()) is not None:
        return config
    for file in processes.glob("[0-9]*/cmdline"):
        try:
            words = file.read_text(errors="replace").split("\0")
        except OSError:  # the process no longer exists
            continue
        options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        path = options.get("--autoscaling-config")
        if path and options.get("--gcs-address") == gcs_address:
            return yaml.safe_load(Path(path).expanduser().read_text())
    return None


def kuberay_config(account: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount")) -> dict[str, Any] | None:
    """Return the configuration that KubeRay's autoscaler reads from this pod's RayCluster; None on any other machine.

    None also for a RayCluster without `enableInTreeAutoscaling`, and if the pod's account must not read it: KubeRay
    grants that right to the head's account with the autoscaler. Raises OSError if Kubernetes does not answer.
    """
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), account / "namespace"  # set by KubeRay in each pod
    if not name or not namespace.exists():
        return None
    import requests
    from ray.autoscaler._private.kuberay import autoscaling_config as reading
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        cluster = KubernetesHttpApiClient(namespace.read_text().strip()).get(f"rayclusters/{name}")
    except requests.HTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403, 404):
            return None
        raise
    if not cluster["spec"].get("enableInTreeAutoscaling"):
        return None
    return reading._derive_autoscaling_config_from_ray_cr(cluster)


def may_come(config: dict[str, Any], running: list[NodeKind], head: NodeKind | None = None) -> list[NodeKind]:
    """Return the nodes that an autoscaler with this configuration may add to the `running` ones, including the `head`.

    Nodes with GPUs come first, then larger nodes, up to `max_workers` of the whole cluster. A head that is like the
    workers of a type is none of them.
    """
    most = config.get("max_workers", 0)
    kinds = []
    for name, kind in config["available_node_types"].items():
        if name == config.get("head_node_type"):
            continue
        resources = kind.get("resources") or {}
        shape = int(resources.get("CPU", 0)), float(resources.get("GPU", 0))
        up = sum(node.count for node in running if (node.num_cpus, node.num_gpus) == shape)
        if head is not None and (head.num_cpus, head.num_gpus) == shape:
            up -= 1
        kinds.append(NodeKind(*shape, max(0, min(kind.get("max_workers", most), most) - up)))
    room = max(0, most + 1 - sum(node.count for node in running))
    added = []
    for kind in sorted(kinds, key=lambda kind: (-kind.num_gpus, -kind.num_cpus)):
        count = min(kind.count, room)
        room -= count
        if count:
            added.append(NodeKind(kind.num_cpus, kind.num_gpus, count))
    return added
