"""The site of `make docs`: the strict build, every link of the result, and what a reader's browser would load."""

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("link", "href"), ("source", "src")}


def build(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site), *arguments]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


class Page(HTMLParser):
    """The ids of a page, the addresses that it links to, and those that it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("id", "name"):
                self.ids.add(value or "")
            elif (tag, key) in LOADED and ("rel", "canonical") not in attrs:
                self.loads.add(value or "")
            elif (tag, key) == ("a", "href"):
                self.links.add(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """Path -> page of the built site."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in folder.rglob("*.html") if path.name != "404.html"}


def root(site: dict[Path, Page]) -> Path:
    return min((path.parent for path in site), key=lambda folder: len(folder.parts))


def test_every_document_is_a_page(site):
    names = {path.name for path in site}
    assert {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")} <= names
    assert {"index.html", "contributing.html", "changelog.html", "examples.html", "folders.html"} <= names


def test_links_lead_somewhere(site):
    """Without mkdocs' opinion, which does not count a link to a file that is excluded."""
    for path, page in site.items():
        for address in page.links | page.loads:
            url = urlsplit(address)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert target.is_file(), f"{path.name}: {address}"
            if url.fragment and target in site:
                assert unquote(url.fragment) in site[target].ids, f"{path.name}: {address}"


def test_files_outside_docs_are_linked_within_the_site(site):
    pages = {path.name: page for path, page in site.items() if path.parent == root(site)}
    assert "examples.html#domain_data.py" in pages["usage.html"].links
    assert {"contributing.html", "examples.html", "method.html#mixtures-of-experts"} <= pages["index.html"].links
    assert {"folders.html#calibration", "folders.html#vllm_smoothquant"} <= pages["contributing.html"].links


def test_a_reader_loads_nothing_from_a_network(site):
    """Neither a page nor its style sheets; in the theme's script, addresses stand only for what these pages lack."""
    folder = root(site)
    for path, page in site.items():
        assert page.loads, path.name
        assert not [address for address in page.loads if urlsplit(address).netloc], path.name
        assert 'class="mermaid"' not in path.read_text(), (
            f"{path.name}: the theme draws it with a script from a network"
        )
    for path in folder.rglob("*.css"):
        text = path.read_text()
        assert "url(http" not in text, path.name
        assert "url(//" not in text, path.name
        assert "@import" not in text, path.name


FAULTS = {
    "a missing page": ("[a](nowhere.md)", "nowhere.md"),
    "a missing anchor": ("[a](usage.md#nowhere)", "usage.md#nowhere"),
    "a file outside docs that the site lacks": ("[a](../pyproject.toml)", "../pyproject.toml"),
}


def test_a_broken_link_stops_the_build(tmp_path):
    """And so does a page that the nav lacks. One build reports all of them."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "docs/extra.md").write_text("# Extra\n\n" + "\n\n".join(link for link, _ in FAULTS.values()))
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT}/mkdocs.yml\nhooks: [{ROOT}/packaging/site_pages.py]\n")
    done = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0
    assert 'not included in the "nav" configuration:\n  - extra.md' in done.stderr
    for name, (_, address) in FAULTS.items():
        assert f"WARNING -  Doc file 'extra.md' contains a link '{address}', but" in done.stderr, name
