"""The workflow, the hooks and `.ci/run` do the same things, with targets that exist."""

import re

import yaml

from tests.docs.pages import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def targets_of_ci() -> list[str]:
    [targets] = re.findall(r"^for target in (.*); do$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    return targets.split()


def test_the_workflow_runs_what_ci_runs():
    runs = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs == [".ci/run"]
    [python] = [step["with"] for step in WORKFLOW["jobs"]["checks"]["steps"] if "setup-python" in step.get("uses", "")]
    assert (ROOT / python["python-version-file"]).read_text().strip() == "3.12"
    assert (ROOT / python["cache-dependency-path"]).exists()


def test_hooks_run_what_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    entries = [hook["entry"] for repo in hooks for hook in repo["hooks"]]
    assert {entry.removeprefix("make ") for entry in entries} <= set(targets_of_ci()) <= TARGETS


def test_phony_targets_exist():
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(phony.split()) <= TARGETS


def test_issue_templates_are_forms():
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "new_model", "new_policy"]
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert content["name"] and content["description"]
        fields = [field["id"] for field in content["body"]]
        assert len(fields) == len(set(fields)) > 0
        assert all(field["attributes"]["label"] for field in content["body"])
