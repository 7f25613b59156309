"""What a release says of itself is said in one place, and nothing is published but by a tag."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import moelora

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = ROOT / ".github" / "workflows"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def workflow(name):
    return yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))


def test_the_version_is_written_once():
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert "\nversion:" not in read("CITATION.cff")
    headings = re.findall(r"^## (\S+) \((.+)\)$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0][0] == moelora.__version__


def test_the_changelog_has_each_kind_of_change_once():
    _, _, latest = read("CHANGELOG.md").partition(f"\n## {moelora.__version__} ")
    kinds = re.findall(r"^### (.+)$", latest.partition("\n## ")[0], re.MULTILINE)
    order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]  # that of Keep a Changelog
    assert kinds == [kind for kind in order if kind in kinds] and "Added" in kinds


def test_extras_that_are_named_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "moelora").rglob("*.py")]
    named = {extra for page in pages for extra in re.findall(r"moelora\[([^\]]+)\]", page.read_text(encoding="utf-8"))}
    assert named and named <= PROJECT["optional-dependencies"].keys()


def test_citation():
    citation = yaml.safe_load(read("CITATION.cff"))  # `make dist-test` validates it against its schema
    assert citation["license"] == PROJECT["license"] and citation["type"] == "software"


def test_only_a_tag_publishes_and_only_after_the_tests():
    release = workflow("release.yml")
    assert release[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+*"]}}  # YAML reads `on` as true
    publishing = [name for name, job in release["jobs"].items() if "pypi" in str(job)]
    assert publishing == ["publish"]
    assert release["jobs"]["publish"]["needs"] == ["test", "build"]
    assert release["jobs"]["test"]["needs"] == release["jobs"]["build"]["needs"] == "version"
    assert ".ci/run" in str(release["jobs"]["test"]) and "make dist-test" in str(release["jobs"]["build"])
    others = [path for path in WORKFLOWS.iterdir() if path.name != "release.yml"]
    assert not [
        path.name for path in others if "pypi-publish" in path.read_text() or "twine upload" in path.read_text()
    ]


@pytest.mark.parametrize("name", ["release.yml", "nightly.yml", "site.yml"])
def test_workflows_run_targets_that_make_has(name):
    makefile = read("Makefile")
    jobs = workflow(name)["jobs"].values()
    run = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    matrices = [target for job in jobs for target in job.get("strategy", {}).get("matrix", {}).get("target", ())]
    targets = {*re.findall(r"\bmake ([a-z-]+)", "\n".join(run)), *matrices}
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
