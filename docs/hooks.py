"""Hooks of MkDocs: pages that are made from other files, and links that lead out of docs/.

A page may link any file of the repository, relative to itself, as GitHub reads it. Here such a link becomes that of the
page made from the file, or an address in the repository; one that leads nowhere ends the build.
"""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
SCHEMA = "outlook_parity/report/report.schema.json"

# Page -> the file of the repository that it is.
COPIED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"} | {
    f"results/{path.name}": path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "benchmarks" / "results").iterdir())
    if path.suffix in (".md", ".svg")
}
LINK = re.compile(r"(?<=\]\()([^)#\s]*)(#[^)\s]*)?(?=\))")
FENCED = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)


def on_config(config: Any) -> Any:
    """Take addresses from pyproject.toml."""
    config.site_url = URLS["Documentation"]
    # In the footer. As `repo_url` the theme would ask GitHub about it on every page.
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": URLS["Repository"], "name": "Source"}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    made = {page: (ROOT / source).read_bytes() for page, source in COPIED.items()}
    made["reference/command-line.md"] = command_line().encode()
    made["reference/report.md"] = report_schema().encode()
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links that leave docs/ lead to where their targets are."""
    source = COPIED.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {path: name for name, path in COPIED.items()}

    def replaced(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        if not target or re.match(r"\w+:", target):
            return link[0]
        path = os.path.normpath(Path(source).parent / target)
        if path in pages or path.startswith("docs/"):
            to = pages.get(path, path.removeprefix("docs/"))
            return os.path.relpath(to, Path(page.file.src_uri).parent) + anchor
        if not (ROOT / path).exists():
            raise PluginError(f"{source} links {target}, which is not in the repository")
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{URLS['Repository']}/{kind}/main/{path}{anchor}"

    parts, end = [], 0
    for fence in FENCED.finditer(markdown):
        parts += [LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(replaced, markdown[end:])])


def command_line() -> str:
    """Return a page of every command: what `--help` says, as tables."""
    from typer.main import get_command

    from outlook_parity.cli.app import app

    program = get_command(app)
    parts = ["# Command line", f"{_plain(program.help)}\n\nAs `outlook COMMAND --help` says it."]
    for name, command in program.commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join(["outlook", name, *command.collect_usage_pieces(context)])
        parts += [f"## outlook {name}", f"    {usage}", _paragraphs(command.help)]
        examples = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
        if examples:
            parts.append("```sh\n" + "\n".join(examples) + "\n```")
        panels: dict[str, list[str]] = {}
        for parameter in command.params:
            if parameter.name == "help":
                continue
            panel = "Arguments" if parameter.param_type_name == "argument" else "Options"
            row = f"| {_names(parameter)} | {_cell(parameter.help)} | {_cell(_default(parameter, context))} |"
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or panel, []).append(row)
        for panel, rows in panels.items():
            parts.append("\n".join([f"| {panel} | | default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])


def _default(parameter: Any, context: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    default = parameter.get_default(context)
    if default in (None, "", False) or not parameter.show_default or parameter.required:
        return ""
    return f"`{default}`" if default is not True else "on"


def _cell(text: str | None) -> str:
    return _plain(text).replace("|", "\\|").replace("\n", " ")


def _plain(text: str | None) -> str:
    """Return a help text without Rich's markup, options as code."""
    text = re.sub(r"\[/?(?:bold|dim|italic)?\]", "", text or "").replace("*", "\\*").strip()
    return re.sub(r"(?<![\w`-])--[a-z][\w-]*", r"`\g<0>`", text)


def _paragraphs(text: str | None) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", _plain(text))


def report_schema() -> str:
    """Return a page of the report's JSON schema: its keys as tables, and the whole of it."""
    text = (ROOT / SCHEMA).read_text()
    schema = json.loads(text)
    parts = [
        "# Report as JSON",
        f"What `outlook verify --json` and `outlook compare --json` print, and `Report.to_json()` returns: version "
        f"{schema['properties']['version']['const']} of the schema [`{Path(SCHEMA).name}`](../../{SCHEMA}), which lies "
        "in the package. Numbers that are no finite numbers are null.",
        _keys(schema, "report"),
    ]
    parts += [_keys(definition, name) for name, definition in schema["$defs"].items()]
    parts += ["## The schema", f"```json\n{text.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _keys(schema: dict[str, Any], name: str) -> str:
    rows = [
        f"| `{key}` | {_type(about)} | {_cell(about.get('description'))} |"
        for key, about in schema["properties"].items()
    ]
    title = [f"## {name}", ""] + ([schema["description"], ""] if "description" in schema else [])
    return "\n".join([*title, "| key | type | is |", "|---|---|---|", *rows])


def _type(about: dict[str, Any]) -> str:
    """Return a schema's type in words."""
    if "$ref" in about:
        name = about["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "enum" in about:
        return ", ".join(f"`{value!r}`".replace("'", '"') for value in about["enum"])
    if "const" in about:
        return f"`{about['const']}`"
    if "anyOf" in about:
        return " or ".join(map(_type, about["anyOf"]))
    kinds = about["type"] if isinstance(about["type"], list) else [about["type"]]
    words = " or ".join(kinds)
    if "items" in about:
        return f"{words} of {_type(about['items'])}"
    if isinstance(about.get("additionalProperties"), dict):
        return f"{words} of {_type(about['additionalProperties'])}"
    return words
