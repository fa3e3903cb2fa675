"""mkdocs.yml's hook: pages of the site that are made of files outside docs/, and links to such files.

A page is written once, for readers of the repository, and its links are relative to its file. The site has each of
these files in one place (PLACES); here links are made to lead there. A link to anything else stays as it is, and the
strict build reports it.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")  # no address: that has a colon
WHOLE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
EXAMPLES = sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.*"))
READMES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("[a-z]*/**/README.md"))
READMES = [name for name in READMES if not name.startswith("docs/")]  # these are pages

# File or folder of the repository -> place in the site.
PLACES = (
    WHOLE
    | {"examples": "examples.md"}
    | {name: f"examples.md#{os.path.basename(name)}" for name in EXAMPLES}
    | {name: f"folders.md#{os.path.dirname(name).replace('/', '-')}" for name in READMES}
)


def on_files(files, config):
    pages = {page: _lead(_read(name), name, page) for name, page in WHOLE.items()}
    pages["examples.md"] = _examples()
    pages["folders.md"] = _folders()
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    return markdown if page.file.generated_by else _lead(markdown, f"docs/{name}", name)


def _lead(markdown: str, name: str, page: str) -> str:
    """`markdown` of the file `name` with links as they must be in the site's page `page`."""

    def link(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(name), match[1]))
        place, _, anchor = PLACES.get(target, target.removeprefix("docs/")).partition("#")
        if target not in PLACES and not target.startswith("docs/"):
            return match[0]
        return os.path.relpath(place, os.path.dirname(page)) + (match[2] or (anchor and f"#{anchor}"))

    return LINK.sub(link, markdown)


def _examples() -> str:
    """The programs in examples/, each under a heading whose anchor is the file's name."""
    parts = ["# Examples\n\nThe programs in `examples`, to start from.\n"]
    for name in EXAMPLES:
        language = {".py": "python", ".sh": "sh"}[Path(name).suffix]
        base = os.path.basename(name)
        parts.append(f"## {base} {{ id='{base}' }}\n\n````{language}\n{_read(name)}````\n")
    return "\n".join(parts)


def _folders() -> str:
    """The READMEs of all folders, one below the other."""
    parts = ["# Folder by folder\n\nEach folder of the repository has a README with its files and how to add to it.\n"]
    for name in READMES:
        folder = os.path.dirname(name)
        first, rest = _read(name).split("\n", 1)
        parts.append(
            f"## {folder}: {first.partition(': ')[2]} {{ id='{folder.replace('/', '-')}' }}\n"
            f"{_lead(rest, name, 'folders.md')}"
        )
    return "\n".join(parts)


def _read(name: str) -> str:
    return (ROOT / name).read_text()
