"""Write README.md from nbs/index.ipynb, without Quarto, and nbs/llms.txt, the website's table of contents for programs that read.

    python tools/readme.py            # write both
    python tools/readme.py --check    # only say whether both are up to date; exit code 1 if not

Hidden cells are left out, and so are directives and the outputs of code that is not shown. Links and pictures, which are
relative to nbs/ in the notebook, are made relative to the top folder. A picture must be a file (nbs/images/…), not an output.
"""
import re
import sys
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by tools/readme.py from nbs/index.ipynb. Change the notebook, then run `make readme`. -->\n\n"


def directives(source):
    "The names of the directives (`#| name: value`) at the top of a cell."
    return {m[1] for m in re.finditer(r"^#\|\s*([\w-]+)", source, re.MULTILINE)}


def without_directives(source):
    "The source of a cell without its directive lines."
    return re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip("\n")


def from_top(markdown):
    "Relative links and pictures, seen from the top folder. Code blocks stay as they are; absolute links and anchors too."
    def moved(match):
        path = Path("nbs", match[2])
        parts = []
        for part in path.parts:
            parts = parts[:-1] if part == ".." else [*parts, part]
        return match[1] + "/".join(parts) + match[3]

    pieces = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    link = r"(\]\()(?![a-z]+:|#|/)([^)\s#]+)((?:#[^)\s]*)?(?:\s+\"[^\"]*\")?\))"
    tag = r"(<img [^>]*?src=\")(?![a-z]+:|/)([^\"]+)(\")"
    return "".join(p if p.startswith("```") else re.sub(tag, moved, re.sub(link, moved, p)) for p in pieces)


def readme(notebook):
    "The text of README.md for this notebook."
    nb = nbformat.read(notebook, as_version=4)
    kept = []
    for cell in nb.cells:
        names = directives(cell.source) if cell.cell_type == "code" else set()
        if cell.cell_type == "raw" or "hide" in names or names & {"default_exp"}:
            continue
        if cell.cell_type == "code":
            cell.source = without_directives(cell.source)
            if any("image/png" in o.get("data", {}) for o in cell.outputs):
                sys.exit(f"{notebook}: a picture among the outputs. Save it under nbs/images and show it with ![…](images/…).")
            cell.outputs = [o for o in cell.outputs if o.output_type != "error" and o.get("name") != "stderr"]
        if cell.source:
            kept.append(cell)
    nb.cells = kept
    nb.metadata["language_info"] = {"name": "python"}  # cleaning removes it; it names the language of the code blocks
    exporter = MarkdownExporter(config=Config({"NbConvertBase": {"display_data_priority": ["text/markdown", "text/plain"]}}))
    text, _ = exporter.from_notebook_node(nb)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return NOTE + from_top(re.sub(r"\n{3,}", "\n\n", text).strip()) + "\n"


def title_of(notebook):
    "(title, summary) of a notebook: its first heading, and the line that begins with `>`."
    text = "\n".join(c.source for c in nbformat.read(notebook, as_version=4).cells[:2] if c.cell_type == "markdown")
    title, summary = re.search(r"^# (.+)$", text, re.MULTILINE), re.search(r"^> (.+)$", text, re.MULTILINE)
    return title[1].strip("`"), summary[1] if summary else ""


def llms(folder):
    "The text of llms.txt (llmstxt.org) for the notebooks that the sidebar in `folder` lists."
    contents = yaml.safe_load((folder / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    name, summary = title_of(folder / contents[0])
    note = "Addresses are relative to this file. The notebooks are source, documentation and tests at once."
    lines = [f"# {name}", "", f"> {summary}", "", note]
    for section in contents[1:]:
        lines += ["", f"## {section['section']}", ""]
        for file in section["contents"]:
            title, summary = title_of(folder / file)
            lines.append(f"- [{title}]({file.removesuffix('.ipynb')}.html): {summary}")
    return "\n".join(lines) + "\n"


def main():
    texts = {ROOT / "README.md": readme(ROOT / "nbs" / "index.ipynb"), ROOT / "nbs" / "llms.txt": llms(ROOT / "nbs")}
    for target, text in texts.items():
        same = target.exists() and target.read_text(encoding="utf-8") == text
        if "--check" in sys.argv[1:] and not same:
            sys.exit(f"{target.name} differs from the notebooks. Run: make readme")
        if not same:
            target.write_text(text, encoding="utf-8")
        print(f"{target.name}: {'already up to date' if same else 'written'}")


if __name__ == "__main__":
    main()
