import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import ray.autoscaler
import yaml
from botocore.validate import ParamValidator
from command_lines import calls, is_shell, problem
from ray.autoscaler._private.util import prepare_config, validate_config
from yaml_keys import key_lines, misspelt, uncommented

import gross_ray

ROOT = Path(gross_ray.__file__).parents[1]
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
AWS = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
LOCAL = (ROOT / "cluster-local.yaml").read_text(encoding="utf-8")


def with_fall_back(text: str) -> str:
    """Return cluster.yaml with its choice of on-demand workers made, as its comment says."""
    lines = text.splitlines()
    first = lines.index("  # gpu_on_demand:")
    last = first
    while last < len(lines) and lines[last].startswith("  # "):
        lines[last] = lines[last].replace("# ", "", 1)
        last += 1
    return "\n".join(lines) + "\n"


FILES = {"aws": AWS, "aws-fall-back": with_fall_back(AWS), "local": LOCAL}


@cache
def run_instances() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


@cache
def ray_schema() -> dict[str, Any]:
    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))


def unknown_values(value: Any, shape: Any, path: str) -> Iterator[str]:
    """Yield the values that are none of those EC2 lists, which botocore itself leaves to the server."""
    if shape.type_name == "structure":
        for key in value.keys() & shape.members.keys():
            yield from unknown_values(value[key], shape.members[key], f"{path}.{key}")
    elif shape.type_name == "list":
        for place, item in enumerate(value):
            yield from unknown_values(item, shape.member, f"{path}[{place}]")
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield f"{path}: {value!r} is none of EC2's"


def problems(config: dict[str, Any]) -> list[str]:
    """Return what Ray or EC2 would refuse in a cluster file, or read past."""
    try:
        validate_config(prepare_config(config))
    except Exception as error:  # Ray's own kinds of refusal have no common one below it
        return [f"Ray: {type(error).__name__}: {error}"]
    known = ray_schema()["properties"]["provider"]["properties"]
    found = [f"provider.{key}: Ray reads no such key" for key in config["provider"].keys() - known.keys()]
    for name, kind in config.get("available_node_types", {}).items():
        wrong = kind["resources"].keys() - {"CPU", "GPU", "memory"}
        found += [f"{name}.resources.{key}: work asks for none" for key in wrong]
        given = kind["node_config"] | {"MinCount": 1, "MaxCount": 1}  # Ray's own part of the call
        report = ParamValidator().validate(given, run_instances())
        found += [f"{name}.node_config: {report.generate_report()}"] if report.has_errors() else []
        found += unknown_values(given, run_instances(), f"{name}.node_config")
        found += [f"{name}: no {key}" for key in {"InstanceType", "ImageId", "IamInstanceProfile"} - given.keys()]
        both = {"gross-ray-head", "gross-ray-worker"}
        if given.get("IamInstanceProfile", {}).get("Name") not in both:
            found.append(f"{name}: IamInstanceProfile is none of docs/cluster.md's")
    if config["file_mounts"].get(project_folder(config)) != "." or "~/.ray/auth_token" not in mounts(config):
        found.append("file_mounts: the project or the token is missing")
    return found


def mounts(config: dict[str, Any]) -> list[str]:
    """Return where the files land, the home folder of the nodes' user as ~."""
    return [path.replace("/home/ray", "~") for path in config["file_mounts"]]


def project_folder(config: dict[str, Any]) -> str:
    """Return the folder that the set-up commands install, checking that it is with its constraints."""
    (install,) = [call for line in config["setup_commands"] for call in calls(line) if call[:2] == ["pip", "install"]]
    folder = install[-1]
    assert install[install.index("--constraint") + 1] == f"{folder}/constraints.txt"
    return folder


@pytest.fixture(params=FILES)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(FILES[request.param])


def test_lawful_for_ray_and_ec2(config: dict[str, Any]) -> None:
    assert problems(config) == []


# A worker's type may have any name; every other key is somebody's.
KEYS = [
    pytest.param(text, path, id=f"{name}-" + "-".join(map(str, path[1:])))
    for name, text in FILES.items()
    for path, _ in key_lines(text)
    if path[1:] not in (("available_node_types", "gpu_spot"), ("available_node_types", "gpu_on_demand"))
]


@pytest.mark.parametrize("text, path", KEYS)
def test_a_misspelt_key_is_found_at_any_level(text: str, path: tuple[str | int, ...]) -> None:
    (config,) = misspelt([yaml.safe_load(text)], path)
    assert problems(config) != []


@pytest.mark.parametrize(
    "old, new",
    [
        ("g6.2xlarge", "g6.2xlargest"),
        ("VolumeSize: 140", "VolumeSize: large"),
        ("VolumeType: gp3", "VolumeType: gp9"),
        ("MarketType: spot", "MarketType: sport"),
        ("Name: gross-ray-worker", "Name: gross-ray"),
        ("head_node_type: head", "head_node_type: heads"),
        ("max_workers: 4", "max_workers: -1"),
        ("min_workers: 0", "min_workers: few"),
        ("type: aws", "type: awz"),
        ("auth_token: ~/.ray/auth_token", "token: ~/.ray/auth_token"),
        ("/home/ray/gross_ray: .", "/home/ray/gross: ."),
    ],
)
def test_a_wrong_value_is_found(old: str, new: str) -> None:
    assert old in AWS
    assert problems(yaml.safe_load(AWS.replace(old, new))) != []


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
def test_every_key_has_a_comment(text: str) -> None:
    assert uncommented(text) == []


def test_the_comment_check_can_fail() -> None:
    text = '# a\na: "# 1"\nb:  # b\n  c: [1,\n    2]  # c\n# not in its block\n  d: {e: 1}\n---\nf: 1\n'
    assert uncommented(text) == [(0, "b", "c"), (0, "b", "d"), (0, "b", "d", "e"), (1, "f")]


def test_the_choice_of_a_fall_back() -> None:
    without, chosen = yaml.safe_load(AWS), yaml.safe_load(FILES["aws-fall-back"])
    types = chosen["available_node_types"]
    on_demand = types.pop("gpu_on_demand")
    assert chosen == without  # the block is in its place, and nothing else changed
    spot = types["gpu_spot"]
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot.pop("priority") > on_demand.pop("priority")
    assert on_demand == spot
    assert "InstanceMarketOptions" not in types["head"]["node_config"]


def test_fits_this_project(config: dict[str, Any]) -> None:
    python = re.findall(r'^python_version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[0]
    tag = f"rayproject/ray:{PINNED['ray']}-py{python.replace('.', '')}-"
    if "docker" in config:
        assert config["docker"]["image"] == f"{tag}gpu"
        assert config["docker"]["head_image"] == f"{tag}cpu"
        assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    else:
        assert config["setup_commands"][0].split(" || ")[1].startswith(f"python{python} -m venv ")
        starts = [config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]]
        assert all(line.startswith("RAY_AUTH_MODE=token ") for line in starts)
        # Found by starting it: without the first no worker ever joins, without the second `ray down` stops nothing.
        assert " RAY_enable_autoscaler_v2=0 " in starts[0]
        assert any(
            line.endswith("'export PATH=~/gross_ray_env/bin:$PATH' >> ~/.bashrc") for line in config["setup_commands"]
        )
    for here in config["file_mounts"].values():
        # The token's place is Ray's own; the file itself is made by `ray get-auth-token --generate`.
        assert here == "~/.ray/auth_token" or (ROOT / here / "constraints.txt").exists()
    for kind in config.get("available_node_types", {}).values():
        assert 0 <= kind.get("min_workers", 0) <= kind.get("max_workers", 0) <= config["max_workers"]


def test_the_dashboard_stays_on_loopback(config: dict[str, Any]) -> None:
    assert not any("dashboard-host" in line for line in config["head_start_ray_commands"])
    assert "security_group" not in config["provider"]  # Ray's own opens port 22 and nothing else


COMMANDS = [
    pytest.param(line, id=f"{name}-{kind}-{place}")
    for name, text in FILES.items()
    for kind, lines in yaml.safe_load(text).items()
    if kind.endswith("_commands")
    for place, line in enumerate(lines)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_are_sound(line: str) -> None:
    assert is_shell(line)
    assert [found for call in calls(line) if (found := problem(call))] == []


def policy(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "deploy" / "aws" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_policies_name_real_actions() -> None:
    # IAM's names that are no operation of the service: S3's multipart and listing ones, and handing a role over.
    beside = {"s3": {"ListBucket"}, "iam": {"PassRole"}}
    for name in ("head", "worker", "trust"):
        for statement in policy(name)["Statement"]:
            actions = statement["Action"]
            for action in [actions] if isinstance(actions, str) else actions:
                service, _, operation = action.partition(":")
                model = botocore.session.get_session().get_service_model(service)
                assert operation in {*model.operation_names, *beside.get(service, ())}, action


def test_the_policies_fit_the_cluster() -> None:
    config, head, worker = yaml.safe_load(AWS), policy("head"), policy("worker")
    (results,) = worker["Statement"]
    assert results in head["Statement"]  # the same bucket, the same rights on it
    by_name = {statement["Sid"]: statement for statement in head["Statement"]}
    tag = by_name["EndThisClustersNodes"]["Condition"]["StringEquals"]
    assert tag == {"ec2:ResourceTag/ray-cluster-name": config["cluster_name"]}
    profile = config["available_node_types"]["gpu_spot"]["node_config"]["IamInstanceProfile"]["Name"]
    assert by_name["WorkersRole"]["Resource"].endswith(f":role/{profile}")
    images = {kind["node_config"]["ImageId"] for kind in config["available_node_types"].values()}
    (image,) = images
    allowed = by_name["NewestImage"]["Resource"].partition(":parameter")[2].rstrip("*")
    assert image.removeprefix("resolve:ssm:").startswith(allowed)
