"""Fences the examples of docstrings, which Markdown would otherwise take for text with links."""

import re

import griffe


class Fence(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^>>> .*(?:\n.+)*", lambda block: f"```pycon\n{block[0]}\n```", obj.docstring.value, flags=re.M
            )
