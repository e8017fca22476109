import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_schema import problems
from yaml_keys import key_lines, misspelt, uncommented

import gross_ray

ROOT = Path(gross_ray.__file__).parents[1]
TEXT = (ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8")
KEYS = [path for path, _ in key_lines(TEXT)]
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))


@pytest.fixture
def documents() -> list[Any]:
    return list(yaml.safe_load_all(TEXT))


def test_lawful_for_kubernetes_and_kuberay(documents: list[Any]) -> None:
    assert problems(documents) == []


@pytest.mark.parametrize("path", KEYS, ids=lambda path: "-".join(map(str, path)))
def test_a_misspelt_key_is_found_at_any_level(documents: list[Any], path: tuple[str | int, ...]) -> None:
    assert problems(misspelt(documents, path)) != []


def spec_of(kind: str, documents: list[Any]) -> dict[str, Any]:
    return next(document["spec"] for document in documents if document["kind"] == kind)


def head_container(documents: list[Any]) -> dict[str, Any]:
    return spec_of("RayCluster", documents)["headGroupSpec"]["template"]["spec"]["containers"][0]


CHANGES: dict[str, Callable[[list[Any]], object]] = {
    "apiVersion": lambda found: found[1].update(apiVersion="ray.io/v1alpha1"),
    "kind": lambda found: found[2].update(kind="RayJobs"),
    "mode": lambda found: spec_of("RayCluster", found)["authOptions"].update(mode="tokens"),
    "no version": lambda found: spec_of("RayCluster", found).pop("rayVersion"),
    "no head": lambda found: spec_of("RayCluster", found).pop("headGroupSpec"),
    "service": lambda found: spec_of("RayCluster", found)["headGroupSpec"].update(serviceType="clusterip"),
    "ray start": lambda found: spec_of("RayCluster", found)["headGroupSpec"]["rayStartParams"].update({"cpus": "0"}),
    "number": lambda found: spec_of("RayCluster", found)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    "min": lambda found: spec_of("RayCluster", found)["workerGroupSpecs"][0].update(minReplicas=5),
    "max": lambda found: spec_of("RayCluster", found)["workerGroupSpecs"][0].update(maxReplicas="4"),
    "env": lambda found: head_container(found)["env"][0].update(value=0),
    "container": lambda found: head_container(found).pop("name"),
    "account": lambda found: found[0]["metadata"].update(name="gross"),
    "selected": lambda found: spec_of("RayJob", found)["clusterSelector"].update({"ray.io/cluster": "gross"}),
    "submission": lambda found: spec_of("RayJob", found).update(submissionMode="K8sMode"),
    "sidecar": lambda found: spec_of("RayJob", found).update(submissionMode="SidecarMode"),
    "backoff": lambda found: spec_of("RayJob", found).update(backoffLimit=1),
    "kept": lambda found: spec_of("RayJob", found).update(ttlSecondsAfterFinished=60),
    "no cluster": lambda found: spec_of("RayJob", found).pop("clusterSelector"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_wrong_value_is_found(documents: list[Any], change: Callable[[list[Any]], object]) -> None:
    changed = deepcopy(documents)
    change(changed)
    assert problems(changed) != []


def test_every_key_has_a_comment() -> None:
    assert uncommented(TEXT) == []


def test_fits_this_project(documents: list[Any]) -> None:
    cluster, job = spec_of("RayCluster", documents), spec_of("RayJob", documents)
    assert cluster["rayVersion"] == PINNED["ray"]
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    python = ".".join(re.findall(r'^python_version = "(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text(), re.M)[0])
    base = f"rayproject/ray:{PINNED['ray']}-py{python.replace('.', '')}-${{DEVICE}}"
    assert re.findall(r"^FROM (\S+)$", dockerfile, re.M) == [base]
    folder = re.findall(r"^COPY .* \. (\S+)$", dockerfile, re.M)[0]
    assert dockerfile.rstrip().endswith(f"--constraint {folder}/constraints.txt {folder}")
    version = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[0]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert len(images) == 1 and images.pop().endswith(f"/gross-ray:{version}")
    assert f"/gross-ray:{version} ." in dockerfile
    assert job["entrypoint"].startswith("gross run ")


def test_open_to_nobody_outside(documents: list[Any]) -> None:
    cluster = spec_of("RayCluster", documents)
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not {"enableIngress", "headService"} & set(cluster["headGroupSpec"])
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        assert "hostNetwork" not in pod
        assert not any("ports" in container for container in pod["containers"])
        assert {entry["name"] for container in pod["containers"] for entry in container["env"]} == {
            "RAY_USAGE_STATS_ENABLED"
        }
