"""What mkdocs does beside building the pages: a link from a page to a file of the repository that
lies outside of docs/ is one on GitHub as it stands; in the site it is to a copy, under files/."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()([^)\s#]+)")
_copied = {}


def on_files(files, config):
    _copied.clear()
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for _, target in _LINK.findall(Path(page.abs_src_path).read_text()):
            path = _outside(page.src_uri, target)
            if path and path not in _copied:
                _copied[path] = f"files/{path}"
                source = str(ROOT / path)
                files.append(File.generated(config, _copied[path], abs_src_path=source))
    return files


def on_page_markdown(markdown, page, config, files):
    def rewritten(match):
        path = _outside(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        folder = posixpath.dirname(page.file.src_uri) or "."
        return match[1] + posixpath.relpath(f"files/{path}", folder)

    return _LINK.sub(rewritten, markdown)


def _outside(page, target):
    """The file under the root that a link of a page means, None if it lies in docs/."""
    if "://" in target:
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return path if not path.startswith("docs/") and (ROOT / path).is_file() else None
