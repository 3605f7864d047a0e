"""Make the example texts from what ships with CPython: library source and the language reference.

Two kinds of text, so that a report can show both faces of a compressed model:

* in-domain: Python source. Calibration comes from here and so does `in_domain.txt`.
* out-of-domain: English prose of the language reference (`pydoc_data.topics`). The model is trained
  on some of it, calibration never sees any, and `out_of_domain.txt` is held out from both.

`calibration_prose.txt` is for models that were trained elsewhere (`real_model.py`): calibrated on English
prose, they are judged on `out_of_domain.txt`, which is then other prose of the same kind, and on the Python
source of `in_domain.txt`, which is foreign to the calibration.

Whole files (whole topics) go to one split by a hash of their name, so no held-out text is a
neighbour of training text. All of it is under the PSF License Version 2, see `examples/README.md`.

Run `python examples/make_texts.py`; the four committed texts came from CPython 3.11.7.
"""

from __future__ import annotations

import ast
import hashlib
import pydoc_data.topics
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TEXT_DIR = Path(__file__).parent / "text"
DOCUMENT_END = "\n\x00\n"  # becomes the end-of-sequence token; no source file contains a NUL
CALIBRATION_CHARACTERS = 900_000
HELD_OUT_CHARACTERS = 240_000

# Tables rather than text: they would teach the model digits and little else.
SKIPPED_DIRECTORIES = {"site-packages", "encodings", "pydoc_data", "__pycache__", "cjkencodings"}


def stdlib_sources() -> Iterator[tuple[str, str]]:
    """Yield (relative name, text) of every readable UTF-8 module of the standard library, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_DIRECTORIES.intersection(name.parts) or name.parts[0].startswith("config-"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few test files are in other encodings on purpose
        if "\x00" not in text and text.isascii():
            # Build-time constants name the place this interpreter was installed in.
            text = text.replace(sys.base_prefix, "/usr/local")
            # Addresses that programs upload to are no business of a corpus.
            yield name.as_posix(), re.sub(r"upload\.\w+\.org", "upload.example.org", text)


def split_of(name: str) -> str:
    """Assign a document to a split by its name: 85 % train, 8 % calibration, 7 % held_out."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    if share < 0.85:
        return "train"
    return "calibration" if share < 0.93 else "held_out"


def docstrings(source: str) -> str:
    """Collect the docstrings of a module: English prose about code, one paragraph each."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(text for text in found if text and len(text) > 120)


def is_reference_held_out(topic: str) -> bool:
    """Hold out two topics in five of the language reference."""
    return hashlib.sha256(topic.encode()).digest()[0] % 5 < 2


def training_documents() -> list[str]:
    """Return every training document: source, docstrings, and the training part of the reference."""
    sources = [(name, text) for name, text in stdlib_sources() if split_of(name) == "train"]
    is_test = {name: {"test", "tests", "idlelib"}.intersection(name.split("/")) for name, _ in sources}
    # The test suite outweighs the library and repeats itself: every second file of it is enough.
    chosen = [text for i, (name, text) in enumerate(sources) if not is_test[name] or i % 2 == 0]
    prose = [docstrings(text) for name, text in sources if not is_test[name]]
    topics = pydoc_data.topics.topics
    reference = [text for name, text in sorted(topics.items()) if not is_reference_held_out(name)]
    return [text for text in chosen + prose + 3 * reference if text.strip()]


def _take(documents: list[str], characters: int) -> str:
    """Join the beginnings of many documents, so that a short text still shows variety."""
    longest = max(4_000, 2 * characters // max(1, len(documents)))
    joined = DOCUMENT_END.join(text[:longest].strip() for text in documents)
    return joined[:characters].replace(DOCUMENT_END, "\n\n\n") + "\n"


def main() -> None:
    """Write calibration.txt, calibration_prose.txt, in_domain.txt and out_of_domain.txt."""
    sources = [(split_of(name), text) for name, text in stdlib_sources()]
    topics = sorted(pydoc_data.topics.topics.items())
    prose = [t for n, t in topics if not is_reference_held_out(n)]
    prose += [d for s, t in sources if s == "calibration" and (d := docstrings(t))]
    texts = {
        "calibration": _take([t for s, t in sources if s == "calibration"], CALIBRATION_CHARACTERS),
        "calibration_prose": _take(prose, CALIBRATION_CHARACTERS),
        "in_domain": _take([t for s, t in sources if s == "held_out"], HELD_OUT_CHARACTERS),
        "out_of_domain": _take([t for n, t in topics if is_reference_held_out(n)], HELD_OUT_CHARACTERS),
    }
    TEXT_DIR.mkdir(exist_ok=True)
    for name, text in texts.items():
        (TEXT_DIR / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(text):,} characters")


if __name__ == "__main__":
    main()
