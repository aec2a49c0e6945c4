"""Writes expected.json: what the `transformers` library makes of every template here for every conversation.

Run it where transformers is installed (it is not needed for the tests): python tests/data/chat/record.py
Threads: a script.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def main() -> None:
    cases = json.loads((HERE / "cases.json").read_text())
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(HERE.glob("*.jinja")):
        for name, case in cases.items():
            arguments = {"add_generation_prompt": True, **TOKENS, **case.get("variables", {})}
            try:
                rendered, _ = render_jinja_template(
                    [case["messages"]], chat_template=path.read_text(), **arguments
                )
                result = {"text": rendered[0]}
            except Exception as error:
                result = {"error": str(error)}
            found.setdefault(path.stem, {})[name] = result
    text = json.dumps(
        {"transformers": transformers.__version__, "results": found}, indent=1, ensure_ascii=False
    )
    (HERE / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
