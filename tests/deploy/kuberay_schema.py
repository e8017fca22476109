"""A strict model of KubeRay's RayCluster and RayJob, as JSON schema: any key that they do not have is refused.

KubeRay's own fields were written down by hand from the published Go types of ray.io/v1 (RayCluster: KubeRay 1.7;
RayJob: 1.3, whose fields later versions keep). Its CRD is over a megabyte, nearly all of it Kubernetes' pod template
once for each group; for that part this refers to the schemas of Kubernetes itself, which kubernetes-validate carries
in a form without unknown keys. Left out are the fields behind feature gates, and those for Redis, TLS and ingress: a
file that needs them has to add them here.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from ray.scripts.scripts import start
from referencing import Registry, Resource

KUBERNETES = "v1.37.0"
_DEFINITIONS = "https://kubernetes.io/api/_definitions.json"

_TEXT = {"type": "string"}
_FLAG = {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_COUNT = {"type": "integer", "minimum": 0}


def _core(name: str) -> dict[str, Any]:
    """Refer to a type of Kubernetes' core/v1."""
    return {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.api.core.v1.{name}"}


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


_RAY_START_OPTIONS = [
    name.removeprefix("--") for option in start.params for name in option.opts if name.startswith("--")
]
_START = {"type": "object", "additionalProperties": _TEXT, "propertyNames": {"enum": _RAY_START_OPTIONS}}

_AUTOSCALER = _object(
    resources=_core("ResourceRequirements"),
    image=_TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    securityContext=_core("SecurityContext"),
    idleTimeoutSeconds=_COUNT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    version={"enum": ["v1", "v2"]},
    env=_list(_core("EnvVar")),
    envFrom=_list(_core("EnvFromSource")),
    volumeMounts=_list(_core("VolumeMount")),
    command=_list(_TEXT),
    args=_list(_TEXT),
)
_HEAD = _object(
    required="template",
    template=_core("PodTemplateSpec"),
    headService=_core("Service"),
    enableIngress=_FLAG,
    resources=_TEXTS,
    labels=_TEXTS,
    rayStartParams=_START,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
)
_WORKERS = _object(
    required="groupName minReplicas maxReplicas template",
    suspend=_FLAG,
    groupName=_TEXT,
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    idleTimeoutSeconds=_COUNT,
    priority={"type": "integer"},
    resources=_TEXTS,
    labels=_TEXTS,
    rayStartParams=_START,
    template=_core("PodTemplateSpec"),
    scaleStrategy=_object(workersToDelete=_list(_TEXT)),
    numOfHosts={"type": "integer", "minimum": 1},
)
_CLUSTER_SPEC = _object(
    required="headGroupSpec",
    upgradeStrategy=_object(type={"enum": ["Recreate", "None"]}),
    authOptions=_object(enableK8sTokenAuth=_FLAG, secretName=_TEXT, mode={"enum": ["disabled", "token"]}),
    suspend=_FLAG,
    managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
    autoscalerOptions=_AUTOSCALER,
    headServiceAnnotations=_TEXTS,
    enableInTreeAutoscaling=_FLAG,
    headGroupSpec=_HEAD,
    rayVersion=_TEXT,
    workerGroupSpecs=_list(_WORKERS),
)
_JOB_SPEC = _object(
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit=_COUNT,
    rayClusterSpec=_CLUSTER_SPEC,
    submitterPodTemplate=_core("PodTemplateSpec"),
    metadata=_TEXTS,
    # The one key that KubeRay reads of it.
    clusterSelector=_object(required="ray.io/cluster", **{"ray.io/cluster": _TEXT}),
    submitterConfig=_object(backoffLimit=_COUNT),
    managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
    entrypoint=_TEXT,
    runtimeEnvYAML=_TEXT,
    jobId=_TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypointResources=_TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=_COUNT,
    shutdownAfterJobFinishes=_FLAG,
    suspend=_FLAG,
)


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        required="apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata={"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
        spec=spec,
    )


_KINDS = {
    "RayCluster": _resource("RayCluster", _CLUSTER_SPEC),
    "RayJob": _resource("RayJob", _JOB_SPEC),
    "ServiceAccount": _core("ServiceAccount"),
}


def _registry() -> Registry:
    package = find_spec("kubernetes_validate")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "kubernetes-json-schema" / f"{KUBERNETES}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))
    return Registry().with_resource(_DEFINITIONS, Resource.from_contents(definitions))


_VALIDATORS = {kind: Draft202012Validator(schema, registry=_registry()) for kind, schema in _KINDS.items()}
_QUANTITIES = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}


def problems(documents: list[dict[str, Any]]) -> list[str]:
    """Return what Kubernetes or KubeRay would refuse in `documents`, or silently never serve."""
    found = []
    for document in documents:
        kind = document.get("kind")
        if kind not in _VALIDATORS:
            found.append(f"kind {kind!r} is none of {', '.join(_VALIDATORS)}")
            continue
        if document.get("apiVersion") != ("v1" if kind == "ServiceAccount" else "ray.io/v1"):
            found.append(f"{kind}: apiVersion {document.get('apiVersion')!r}")
        if not document.get("metadata", {}).get("name"):
            found.append(f"{kind}: no name")
        found += [f"{kind}: {error.json_path}: {error.message}" for error in _VALIDATORS[kind].iter_errors(document)]
    return found or _rules(documents)


def _rules(documents: list[dict[str, Any]]) -> list[str]:
    """Return what no schema says: KubeRay's own checks, and names that have to fit across objects."""
    names = {(document["kind"], document["metadata"]["name"]) for document in documents}
    found = []
    for cluster in (document["spec"] for document in documents if document["kind"] == "RayCluster"):
        if cluster.get("authOptions", {}).get("mode") == "token" and "rayVersion" not in cluster:
            found.append("authOptions.mode is token: KubeRay wants rayVersion beside it")
        groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
        for group in groups:
            if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
                found.append(f"{group['groupName']}: minReplicas above maxReplicas")
            pod = group["template"].get("spec", {})
            if ("ServiceAccount", pod.get("serviceAccountName", "")) not in names:
                found.append(f"serviceAccountName {pod.get('serviceAccountName')!r} is not in this file")
            for container in pod.get("containers", []):
                if "image" not in container:
                    found.append(f"container {container['name']}: no image")
                for wanted in ("requests", "limits"):
                    # Kubernetes takes any name here, and a pod that asks for an unknown one waits for ever.
                    unknown = set(container["resources"].get(wanted, {})) - _QUANTITIES
                    found += [f"container {container['name']}: {wanted} of {name}" for name in sorted(unknown)]
    for job in (document["spec"] for document in documents if document["kind"] == "RayJob"):
        selected = job.get("clusterSelector", {}).get("ray.io/cluster")
        if selected is None and "rayClusterSpec" not in job:
            found.append("a RayJob needs clusterSelector or rayClusterSpec")
        if selected is not None:
            if ("RayCluster", selected) not in names:
                found.append(f"clusterSelector: RayCluster {selected!r} is not in this file")
            if job.get("suspend") or job.get("backoffLimit") or job.get("submissionMode") == "SidecarMode":
                found.append("clusterSelector goes with no suspend, backoffLimit or SidecarMode")
        if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
            found.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    return found
