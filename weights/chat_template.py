"""A checkpoint's chat template (jinja2), read as a ``Template``, whose parts truncation and prefix sharing can use.

It is rendered in jinja2's sandbox with transformers' settings, for the messages that sentence-transformers makes of a
pair: system (the instruction), query, document. Texts of many shapes show whether it always gives the same parts in the
same order; a template that does not is refused.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from qwen3core.errors import CheckpointError
from qwen3core.prompts import FIELDS, Template

ROLES = ("system", "query", "document")
MARKS = ("[[1 instruction]]", "[[2 query]]", "[[3 document]]")
PROBES = (
    (" An Instruction\n", "\n a Query? ", "\t Document.\n\n"),
    ("<|im_end|>", "{{ 1 }} & <b> \"q\" 'q' é", "{% if x %} \\n </s> ｄ"),
    ("i " * 500, "q" * 5000, "d\n" * 20000),
    (FIELDS[2], "", ""),
    ("0", "0", FIELDS[1]),
)
"""Texts that trimming, escaping, cutting and conditions would change."""


def read_template(
    source: str, variables: Mapping[str, Any], instruction: str | None, *, structured: bool, where: str
) -> tuple[Template, str]:
    """The template that the jinja2 ``source`` is, and the instruction where a call gives none.

    variables: what it may use beside the messages. instruction: the checkpoint's own; None where the template has it.
    structured: whether a message's content is a list of parts, not a text. where: names it in errors.
    Raises CheckpointError for a template that cannot be rendered, or is not such parts.
    """
    import jinja2  # not at the top: only a checkpoint with a template of its own takes the time
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception

    def render(texts: tuple[str, ...]) -> str:
        contents = [[{"type": "text", "text": text}] if structured else text for text in texts]
        roles = ROLES[-len(texts) :]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        return compiled.render(messages=messages, tools=None, documents=None, **variables)

    def parts(count: int) -> Template:
        """The template of the last ``count`` roles."""
        found = re.split(f"({'|'.join(map(re.escape, MARKS))})", render(MARKS[-count:]))
        template = Template("", tuple(dict(zip(MARKS, FIELDS, strict=True)).get(part, part) for part in found), "")
        whole = set(FIELDS[1:]) <= set(template.body) and len(found) <= 7
        if not whole or any(render(probe[-count:]) != template.fill(*probe) for probe in PROBES):
            raise CheckpointError(
                f"{where}: expected a template that puts instruction, query and document, as they are, between fixed "
                f"texts, found another: {''.join(template.body)!r:.300}"
            )
        return template

    try:
        compiled = environment.from_string(source)
        full = parts(3)
        if instruction is not None:
            return full, instruction
        short = parts(2)
    except CheckpointError:
        raise
    except Exception as error:  # a template is code, and may fail in any way
        raise CheckpointError(
            f"{where}: expected a template of query and document, found one that fails "
            f"({type(error).__name__}: {error})"
        ) from error
    around = "".join("(.*)" if part == FIELDS[0] else re.escape(part) for part in full.body)
    default = re.fullmatch(around, "".join(short.body), re.DOTALL)
    return (full, default[1]) if default and FIELDS[0] in full.body else (short, "")
