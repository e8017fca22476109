import re
from pathlib import Path

import pytest
import yaml
from command_lines import calls, is_shell, problem

import gross_ray

ROOT = Path(gross_ray.__file__).parents[1]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:^    .*\n)+", PAGE, re.M)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0].strip()[:30])
def test_the_commands_are_sound(block: str) -> None:
    assert is_shell(block)
    assert [found for line in block.splitlines() for call in calls(line) if (found := problem(call))] == []


def test_the_job_of_kubernetes_is_sound() -> None:
    documents = yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8"))
    (job,) = [document["spec"] for document in documents if document["kind"] == "RayJob"]
    (call,) = calls(job["entrypoint"])
    assert problem(call) is None


def test_it_goes_all_the_way() -> None:
    lines = [line for block in BLOCKS for line in block.splitlines()]
    found = [shown for line in lines for call in calls(line) if (shown := " ".join(call[:2]))]
    way = ["ray get-auth-token", "ray up", "ray exec", "gross status", "ray down"]
    places = [found.index(step) for step in way]
    assert places == sorted(places)
    assert "--address auto --device cuda --out s3://" in PAGE
    assert "pd.read_parquet(" in PAGE


@pytest.mark.parametrize(
    "command",
    [
        "ray upp cluster.yaml",
        "ray up",
        "ray start --haed",
        "x=1 ~/env/bin/ray start --head --porrt=1",
        "ray exec cluster.yaml 'true && gross run --perset fashion --out a'",
        "ray exec cluster.yaml 'ray statuss'",
        "gross stats a",
        "gross run --preset fashion",
        "for x in a; do gross show; done",
        "aws iam create-rol --role-name a",
        "aws iam create-role --role-name a",
        "aws iam create-instance-profile --instance-profile-name a --nam b",
        "aws s3 mkb s3://a",
    ],
)
def test_the_check_of_commands_can_fail(command: str) -> None:
    assert is_shell(command)
    assert [found for call in calls(command) if (found := problem(call))] != []


def test_the_check_of_shell_can_fail() -> None:
    assert not is_shell("for x in a; do echo 'b; done")
