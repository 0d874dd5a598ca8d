"""Text of models, rewards and users, made safe to show: nothing is hidden, is markup or moves the cursor."""

import unicodedata

PART = "⋯"  # a token that writes no whole character


def visible(text: str) -> str:
    """Characters that would not be seen, or would move others, as ⟨U+202E⟩; a new line as ↵."""

    def show(c: str) -> str:
        hidden = unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp")
        return "↵" if c == "\n" else f"⟨U+{ord(c):04X}⟩" if hidden else c

    return "".join(map(show, text)) or PART


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: no mathtext, no control characters, no label that a legend hides."""
    shown = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def one_line(text: str, width: int = 0) -> str:
    """A line of text that cannot move the cursor, colour the screen or reverse its direction; cut to `width` characters."""
    plain = "".join(c if c == " " or unicodedata.category(c)[0] != "C" else " " for c in " ".join(text.split()))
    return plain if not width or len(plain) <= width else plain[: width - 1] + "…"
