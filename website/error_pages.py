"""A page for each error message of qnext, made of the source when the site is built.

A message is found where one of qnext's error classes is called with a text. Its page tells the
text with its blanks, the class, when it is raised, and what the function that raises it is for.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SLUG = re.compile(r"[^a-z0-9]+")
LONGEST = 60


@dataclass(frozen=True)
class Message:
    """A message: its text with {blanks}, its class, and where and when it is raised."""

    text: str
    error: str
    module: str
    function: str
    says: str  # the function's docstring
    when: str  # the condition that leads there, as code; "" where there is none
    slug: str = ""  # the name of its page


def classes(root: Path = ROOT / "qnext") -> dict[str, str]:
    """qnext's error classes and what they say they are for."""
    found: dict[str, str] = {}
    known = {"QnextError"}
    bodies = [
        node
        for path in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    for _ in range(3):  # of classes of classes of classes
        for node in bodies:
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if node.name == "QnextError" or bases & known:
                known.add(node.name)
                found[node.name] = ast.get_docstring(node) or ""
    return found


def messages(root: Path = ROOT / "qnext") -> list[Message]:
    """Every message, once, in the order of modules and lines."""
    names = classes(root)
    found: dict[tuple[str, str], Message] = {}
    slugs: Counter[str] = Counter()
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        for message in _of_module(tree, module, names):
            if (message.error, message.text) in found:
                continue
            words = SLUG.sub("-", message.text.lower()).strip("-")[:LONGEST].rstrip("-")
            slug = f"{message.error.lower()}-{words}"
            slugs[slug] += 1
            slug += f"-{slugs[slug]}" if slugs[slug] > 1 else ""
            found[message.error, message.text] = replace(message, slug=slug)
    return list(found.values())


def _of_module(tree: ast.Module, module: str, names: dict[str, str]) -> Iterator[Message]:
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        text = _text(node.args[0]) if node.func.id in names and node.args else ""
        if len(re.findall(r"[a-z]{2,}", re.sub(r"{.*?}", "", text))) < 2:
            continue  # a text that is made elsewhere
        above = [node]
        while above[-1] in parents:
            above.append(parents[above[-1]])
        function = next((n for n in above if isinstance(n, ast.FunctionDef)), None)
        says = (ast.get_docstring(function) or "") if function else ""
        yield Message(
            text=text,
            error=node.func.id,
            module=module,
            function=function.name if function else "",
            says=says,
            when=_condition(above),
        )


def _text(node: ast.expr) -> str:
    """The text of a constant or an f-string, blanks in braces."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{_blank(part)}}}"
            for part in node.values
        )
    return ""


def _blank(part: Any) -> str:
    return ast.unparse(part.value)


def _condition(above: list[ast.AST]) -> str:
    """The innermost `if` or `except` around a call."""
    for child, node in pairwise(above):
        if isinstance(node, ast.If):
            told = ast.unparse(node.test)
            return told if child in node.body else f"not ({told})"
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            return f"{ast.unparse(node.type)} was raised"
        if isinstance(node, ast.FunctionDef):
            break
    return ""


def page(message: Message, names: dict[str, str]) -> str:
    """The page of a message, in Markdown."""
    title = message.text.splitlines()[0]
    title = title if len(title) <= 90 else f"{title[:87]}..."
    place = f"{message.module}.{message.function}".rstrip(".")
    lines = [
        f"# {_escaped(title)}",
        "",
        "```text",
        message.text,
        "```",
        "",
        f"A **`{message.error}`**: {_escaped(names[message.error])}",
        "",
        "Words in braces are blanks, named as in the source: in the message stands their value. "
        "It names what was wrong and, where there is one, the line that would be right.",
        "",
        f"Raised by `{place}`" + (", where" if message.when else "."),
    ]
    if message.when:
        lines += ["", "```python", message.when, "```"]
    if message.says:
        lines += ["", "What that function is for:", "", *_quoted(message.says)]
    lines += ["", "All errors that qnext raises on purpose: [errors](../errors.md)."]
    return "\n".join(lines) + "\n"


def listed(found: list[Message]) -> str:
    """The page that lists them all."""
    lines = ["# Every error message", "", f"{len(found)} messages, by class; each has a page."]
    for error in sorted({message.error for message in found}):
        lines += ["", f"## {error}", ""]
        for message in sorted((m for m in found if m.error == error), key=lambda m: m.text.lower()):
            text = _escaped(" ".join(message.text.split()))
            lines.append(f"- [{text}](messages/{message.slug}.md)")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> list[str]:
    return [f"> {_escaped(line)}".rstrip() for line in text.splitlines()]


def _escaped(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\*_{}\[\]<>#|])", r"\\\1", text)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs asks for further pages."""
    from mkdocs.structure.files import File

    found, names = messages(), classes()
    pages = {f"messages/{message.slug}.md": page(message, names) for message in found}
    for name, content in {"messages.md": listed(found), **pages}.items():
        files.append(File.generated(config, name, content=content))
    return files
