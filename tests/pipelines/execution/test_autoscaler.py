"""What an autoscaler's configuration lets come, and where the configuration is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from miniature import ROOT
from ray.autoscaler._private.kuberay import node_provider

from gross_ray.errors import ResourcesError
from pipelines.capacity import Capacity
from pipelines.execution import cluster
from pipelines.execution.autoscaler import autoscaling_config, kuberay_config, may_come
from pipelines.nodes import NodeKind
from pipelines.resources import Resources

HEAD, SMALL, LARGE = NodeKind(0, 0.0), NodeKind(4, 0.0), NodeKind(8, 1.0)


def _config(most: int, **kinds: tuple[dict[str, int], int | None]) -> dict[str, Any]:
    types = {
        name: {"resources": resources} | ({} if count is None else {"max_workers": count})
        for name, (resources, count) in kinds.items()
    }
    head = {"head": {"resources": {"CPU": 0}, "max_workers": 0}}
    return {"max_workers": most, "head_node_type": "head", "available_node_types": head | types}


TWO_KINDS = _config(5, small=({"CPU": 4}, 4), large=({"CPU": 8, "GPU": 1}, 2))


@pytest.mark.parametrize(
    ("config", "there", "coming"),
    [
        (_config(4, gpu=({"CPU": 8, "GPU": 1}, 4)), [HEAD], [NodeKind(8, 1.0, 4)]),
        (_config(4, gpu=({"CPU": 8, "GPU": 1}, 9)), [HEAD], [NodeKind(8, 1.0, 4)]),  # the cluster's limit
        (_config(4, gpu=({"CPU": 8, "GPU": 1}, None)), [HEAD], [NodeKind(8, 1.0, 4)]),
        (_config(4, gpu=({"CPU": 8, "GPU": 1}, 4)), [HEAD, NodeKind(8, 1.0, 3)], [NodeKind(8, 1.0, 1)]),
        (_config(4, gpu=({"CPU": 8, "GPU": 1}, 4)), [HEAD, NodeKind(8, 1.0, 4)], []),
        (_config(0, gpu=({"CPU": 8, "GPU": 1}, 4)), [HEAD], []),
        (TWO_KINDS, [HEAD], [NodeKind(8, 1.0, 2), NodeKind(4, 0.0, 3)]),
        (TWO_KINDS, [HEAD, NodeKind(4, 0.0, 4)], [NodeKind(8, 1.0, 1)]),
    ],
)
def test_what_may_come(config: dict[str, Any], there: list[NodeKind], coming: list[NodeKind]) -> None:
    assert may_come(config, there) == coming


def test_a_head_like_the_workers_takes_none_of_their_places() -> None:
    config, like = _config(4, gpu=({"CPU": 8, "GPU": 1}, 4)), NodeKind(8, 1.0)
    assert may_come(config, [like], like) == [NodeKind(8, 1.0, 4)]
    assert may_come(config, [NodeKind(8, 1.0, 3)], like) == [NodeKind(8, 1.0, 2)]  # the head, and two of the workers
    assert may_come(config, [NodeKind(8, 1.0, 5)], like) == []
    assert may_come(config, [HEAD, NodeKind(8, 1.0, 3)], HEAD) == [NodeKind(8, 1.0, 1)]


def test_the_head_is_known_by_its_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(4, gpu=({"CPU": 8, "GPU": 1}, 4))
    nodes = [{"Alive": True, "Resources": {"CPU": 8, "GPU": 1, "node:__internal_head__": 1.0}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    assert cluster._describe(Resources(device="cuda"), config).num_gpus == 1 + 4


def test_the_configuration_is_the_one_of_this_clusters_monitor(tmp_path: Path) -> None:
    for place, (address, most) in enumerate([("10.0.0.1:6379", 3), ("10.0.0.2:6379", 7)]):
        process, file = tmp_path / f"proc/{place + 10}", tmp_path / f"{place}.yaml"
        process.mkdir(parents=True)
        file.write_text(f"max_workers: {most}")
        words = ["python", "-u", "monitor.py", f"--gcs-address={address}", f"--autoscaling-config={file}", ""]
        (process / "cmdline").write_text("\0".join(words))
    fixed = tmp_path / "proc/30"
    fixed.mkdir()
    (fixed / "cmdline").write_text("python\0monitor.py\0--gcs-address=10.0.0.3:6379\0")
    (tmp_path / "proc/31").mkdir()  # has ended meanwhile
    assert autoscaling_config("10.0.0.1:6379", tmp_path / "proc") == {"max_workers": 3}
    assert autoscaling_config("10.0.0.2:6379", tmp_path / "proc") == {"max_workers": 7}
    assert autoscaling_config("10.0.0.3:6379", tmp_path / "proc") is None


class Kubernetes:
    """Kubernetes's answers about the RayCluster of deploy/kuberay.yaml, as the account of its head gets them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        documents = yaml.safe_load_all((ROOT / "deploy/kuberay.yaml").read_text(encoding="utf-8"))
        self.cluster = next(document for document in documents if document["kind"] == "RayCluster")
        self.cluster["metadata"]["namespace"] = "research"
        self.status = 200
        self.asked: list[tuple[str, str]] = []
        (folder / "namespace").write_text("research\n")
        (folder / "token").write_text("a token")
        monkeypatch.setattr(node_provider, "IN_CLUSTER_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(node_provider.requests, "get", self._get)
        monkeypatch.setenv("RAY_CLUSTER_NAME", self.cluster["metadata"]["name"])

    def _get(self, url: str, headers: dict[str, str], **_: Any) -> requests.Response:
        self.asked.append((url, headers["Authorization"]))
        answer = requests.Response()
        answer.status_code, answer._content = self.status, json.dumps(self.cluster).encode()
        return answer


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubernetes:
    return Kubernetes(tmp_path, monkeypatch)


def test_kuberays_autoscaler_is_found(kubernetes: Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = kuberay_config(tmp_path)
    assert config is not None
    (asked,) = kubernetes.asked
    path = "/apis/ray.io/v1/namespaces/research/rayclusters/gross-ray"
    assert (asked[0].endswith(path), asked[1]) == (True, "Bearer a token")
    assert may_come(config, [HEAD]) == [NodeKind(7, 1.0, 4)]
    found = _described(monkeypatch, [HEAD], config, device="cuda")
    assert (found.num_gpus, found.device, found.autoscales) == (4.0, "cuda", True)


def test_no_autoscaler_of_kuberays(kubernetes: Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (401, 403, 404):
        kubernetes.status = status
        assert kuberay_config(tmp_path) is None
    kubernetes.status = 500
    with pytest.raises(OSError, match="500 Server Error"):
        kuberay_config(tmp_path)
    kubernetes.status = 200
    kubernetes.cluster["spec"]["enableInTreeAutoscaling"] = False
    assert kuberay_config(tmp_path) is None
    kubernetes.asked.clear()
    assert kuberay_config(tmp_path / "nothing is mounted") is None
    monkeypatch.delenv("RAY_CLUSTER_NAME")
    assert kuberay_config(tmp_path) is None
    assert kubernetes.asked == []


def _described(
    monkeypatch: pytest.MonkeyPatch, there: list[NodeKind], config: dict[str, Any] | None, **asked: Any
) -> Capacity:
    nodes = [
        {"Alive": True, "Resources": {"CPU": kind.num_cpus, "GPU": kind.num_gpus}}
        for kind in there
        for _ in range(kind.count)
    ]
    dead = {"Alive": False, "Resources": {"CPU": 64, "GPU": 64}}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [*nodes, dead])
    return cluster._describe(Resources(**asked), config)


def _counted(found: Capacity) -> tuple[int, float, str, float, int, bool]:
    assert not found.one_at_a_time
    cores = (found.num_cpus, found.num_gpus, found.device)
    return (*cores, found.gpus_per_unit, found.cores_per_node, found.autoscales)


def test_only_nodes_that_a_unit_fits_on_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [HEAD, NodeKind(64, 0.0, 3), NodeKind(8, 1.0, 2)]
    assert _counted(_described(monkeypatch, there, None)) == (16, 2.0, "cuda", 0.25, 8, False)
    on_cpus = _described(monkeypatch, there, None, device="cpu")
    assert _counted(on_cpus) == (208, 2.0, "cpu", 0.0, 64, False)
    assert on_cpus.slots(5) == 3 * 12 + 2 * 1


def test_what_may_come_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _counted(_described(monkeypatch, [HEAD], TWO_KINDS)) == (16, 2.0, "cuda", 0.25, 8, True)
    on_cpus = _described(monkeypatch, [HEAD], TWO_KINDS, device="cpu")
    assert _counted(on_cpus) == (28, 2.0, "cpu", 0.0, 8, True)
    assert _described(monkeypatch, [HEAD], TWO_KINDS).slots() == 8


@pytest.mark.parametrize(
    ("there", "config", "asked", "message"),
    [
        (
            [HEAD, NodeKind(4, 1.0, 2)],
            None,
            {"device": "cuda", "gpus_per_unit": 2.0},  # 2 GPUs there are, and on no node
            "a unit of work asks for 1 CPU core and 2 GPU on one node; the cluster has 1 node of 0 CPU cores, "
            "2 nodes of 4 CPU cores and 1 GPU, and no autoscaler on its head: "
            "use --device cpu, lower --gpus-per-unit, or add nodes with that many GPUs",
        ),
        (
            [HEAD],
            TWO_KINDS,
            {"device": "cuda", "gpus_per_unit": 2.0},
            "the cluster has 1 node of 0 CPU cores, and an autoscaler that may add "
            "2 nodes of 8 CPU cores and 1 GPU, 3 nodes of 4 CPU cores: use --device cpu",
        ),
        ([HEAD, NodeKind(0, 1.0)], None, {}, "asks for 1 CPU core and 0.25 GPU on one node; the cluster has"),
        ([HEAD], None, {}, "a unit of work asks for 1 CPU core; the cluster has 1 node of 0 CPU cores, and no auto"),
        ([HEAD], _config(0), {}, "an autoscaler that may add no node more: start a node with cores"),
    ],
)
def test_what_never_fits_is_refused_at_once(
    there: list[NodeKind],
    config: dict[str, Any] | None,
    asked: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ResourcesError) as refused:
        _described(monkeypatch, there, config, **asked)
    assert message in str(refused.value)
