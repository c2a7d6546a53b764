"""A link from a page to a file outside docs/ leads, on the site, to that file on GitHub."""

import posixpath
import re


def on_page_markdown(markdown: str, page, config, files) -> str:
    def on_github(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), link[1]))
        return link[0] if path.startswith("docs/") else f"]({config.repo_url}/blob/main/{path}{link[2] or ''})"

    return re.sub(r"\]\((\.\./[^)#]*)(#[^)]*)?\)", on_github, markdown)
