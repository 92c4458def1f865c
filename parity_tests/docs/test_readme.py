"""README.md: links, what a package index shows of it, and the citation."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from outlook_common import __version__
from parity_tests.support.markdown import ROOT, read_blocks, read_parts

README = ROOT / "README.md"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def in_readme_of_the_package() -> str:
    """README.md as the build puts it into the package's metadata."""
    text = README.read_text()
    for rule in PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/imagenet/README.md"])
def test_every_relative_link_leads_to_a_file_and_its_heading(page: str) -> None:
    path = ROOT / page
    links = [link for link in LINK.findall(path.read_text()) if not link.startswith(("https://", "http://"))]
    for link in links:
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_links_are_absolute_on_a_package_index_and_of_the_one_repository() -> None:
    before, after = LINK.findall(README.read_text()), LINK.findall(in_readme_of_the_package())
    raw = REPOSITORY.replace("https://github.com", "https://raw.githubusercontent.com") + "/main/"
    relative = [link for link in before if not link.startswith("https://")]
    assert len(relative) >= 15
    assert len(before) == len(after)
    for link, absolute in zip(before, after, strict=True):
        base = raw if link.endswith(".svg") else f"{REPOSITORY}/blob/main/"
        assert absolute == (link if link.startswith("https://") else base + link)


def test_every_address_of_the_project_is_in_its_repository_or_site() -> None:
    urls = PYPROJECT["project"]["urls"]
    owner, name = REPOSITORY.split("/")[-2:]
    assert urls["Documentation"] == f"https://{owner}.github.io/{name}/"
    assert all(url.startswith((REPOSITORY, urls["Documentation"])) for url in urls.values())


def test_the_citation_names_the_paper_and_this_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["repository-code"] == REPOSITORY
    paper = citation["references"][0]
    assert [author["family-names"] for author in paper["authors"]] == ["Yuan", "Hou", "Jiang", "Feng", "Yan"]
    assert paper["identifiers"][0]["value"] == "2106.13112"
    bibtex = (ROOT / "docs" / "cite.md").read_text()
    assert paper["title"] in bibtex


def test_each_twins_user_has_ten_lines_that_need_their_framework_alone() -> None:
    parts = {part[0].needs: part for part in read_parts(README)}
    assert {("jax",), ("torch",), (), ("parity",)} == set(parts)
    for twin in ("jax", "torch"):
        (block,) = parts[(twin,)]
        assert 8 <= len([line for line in block.text.splitlines() if line]) <= 12


def test_the_commands_that_set_it_up_stand_near_the_top() -> None:
    lines = README.read_text().splitlines()
    assert next(n for n, line in enumerate(lines) if line.startswith("make verify")) <= 25
    assert next(n for n, line in enumerate(lines) if line.startswith("make test")) <= 25
    assert len(lines) <= 92
    assert read_blocks(README, "sh")


def test_the_speed_in_the_table_is_that_of_the_benchmarks() -> None:
    cases = json.loads((ROOT / "benchmarks" / "results" / "layer_cpu.json").read_text())["measured"]["cases"]
    runs = [
        cases[f"volo_{variant}"][kind] for variant in ("d1", "d2", "d4") for kind in ("forward", "forward+backward")
    ]
    ours = [run[f"{twin} composite"] / run[f"{twin} floor"] for run in runs for twin in ("torch", "jax")]
    timms = [run["timm"] / run["torch floor"] for run in runs]
    models = json.loads((ROOT / "benchmarks" / "results" / "volo_cpu.json").read_text())["measured"]["volo_d1_224"]
    whole = [models[kind][twin] / models[kind]["timm"] for kind in models for twin in ("torch", "jax")]
    text = README.read_text()
    assert f"in {min(ours):.1f} to {max(ours):.1f} times the time of their matrix products" in text
    assert f"timm's in {min(timms):.1f} to {max(timms):.1f}" in text
    assert f"whole VOLO-D1 in {min(whole):.2f} to {max(whole):.2f} of timm's time" in text


def test_the_picture_of_a_verdict_says_what_the_tutorial_finds() -> None:
    picture = (ROOT / "docs" / "images" / "verdict.svg").read_text().replace("&#160;", " ").replace("&#x27;", "'")
    page = (ROOT / "docs" / "port-a-model.md").read_text()
    cause = re.search(r"MISMATCH: … checks differ; (.*)", page)
    assert cause is not None
    assert cause[1] in picture
    assert "outlook verify --torch convnext_torch:model" in picture
