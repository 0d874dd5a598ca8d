"""What is made when the site is built: the gallery's pictures, drawn by the gallery's own code, and the notebooks as pages.

MkDocs calls `on_files`. `python made_pages.py` only draws the pictures, into runs/gallery.
"""

import re
import warnings
from pathlib import Path

HERE = Path(__file__).parent
MADE = HERE.parents[1] / "runs"
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*!\[[^\]]*\]\(([\w/]+\.png)\))?", re.S)


def draw(page: Path, folder: Path) -> list[str]:
    """Runs the page's code. The picture below a block is of the last `ax` that the code made; returns the pictures' paths."""
    space, drawn = {}, []
    for code, picture in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(code, page.name, "exec"), space)
        if picture:
            (folder / picture).parent.mkdir(parents=True, exist_ok=True)
            space["ax"].figure.savefig(folder / picture, dpi=130, bbox_inches="tight")
            drawn.append(picture)
    return drawn


def on_files(files, config):
    from mkdocs.structure.files import File
    from nbconvert import MarkdownExporter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ArviZ 0.23 and PyTorch
        for picture in draw(HERE / "pages" / "gallery.md", MADE):
            files.append(File.generated(config, picture, abs_src_path=str(MADE / picture)))
        for path in sorted(HERE.parent.glob("*.ipynb")):
            text, kept = MarkdownExporter().from_filename(str(path))
            text = re.sub(r"\x1b\[[\d;]*m", "", text)  # colours of a terminal
            pictures = {name: f"{path.stem}_{name}" for name in kept["outputs"]}
            for name, unique in pictures.items():
                text = text.replace(f"]({name})", f"]({unique})")
                files.append(File.generated(config, f"notebooks/{unique}", content=kept["outputs"][name]))
            files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


if __name__ == "__main__":
    print(*draw(HERE / "pages" / "gallery.md", MADE), sep="\n")
