"""`explain REQUEST`: the rules a request would meet, as a table a person reads.

Runs in: the shell.
"""

from __future__ import annotations

from ... import messages
from ...errors import EX_DONE, EX_REFUSED, safe
from ...refusals import Usage, from_wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..cli.grammar import Values
    from ..context import Context

USAGE = "explain [--json] [--as USER] VERB …"


def explain(context: Context, values: Values) -> int:
    """`--json` and, for administrators, `--as USER` come before the verb."""
    words = values.words("words")
    json, user = False, ""
    while words and words[0].startswith("--"):
        option = words[0]
        if option == "--json":
            json, words = True, words[1:]
        elif option == "--as" and len(words) > 1:
            user, words = words[1], words[2:]
        else:
            raise Usage(problem=f"explain has no option {safe(option, 40)}", usage=USAGE)
    if not words:
        raise Usage(problem="explain what?", usage=USAGE)
    if words[0] in ("kvm", "qemu"):
        from .define import run_wrapper

        return run_wrapper(context, ["--explain", *words[1:]])
    return judge(context, request_in(words), user, json=json)


def request_in(words: list[str]) -> messages.Request:
    """The message of a request given as words; raises Usage where its verb changes nothing that a rule could refuse."""
    from ..cli import grammar, verbs
    from ..cli.requests import BUILDERS, build

    verb = verbs.BY_WORD.get(words[0])
    if verb is None or verb.name not in BUILDERS:
        usage = f"explain {'|'.join(sorted(BUILDERS))} …"
        raise Usage(problem=f"there is nothing to explain about {safe(words[0], 40)}", usage=usage)
    return build(verb.name, grammar.parse(grammar.as_words(words), verb).values)


def judge(context: Context, request: messages.Request, user: str = "", *, json: bool = False) -> int:
    """Ask the broker and show its answer; the exit status is 0 if the request would be allowed."""
    from ..ui import output

    answer = context.ask(messages.Explain(request=request.to_body(), user=user))
    if json:
        output.document(context, answer)
    else:
        _show(context, answer)
    return EX_DONE if answer.get("allowed") is True else EX_REFUSED


def _show(context: Context, answer: dict[str, object]) -> None:
    from ..ui import output

    rules = output.rows(answer.get("rules"))
    if answer.get("allowed") is True:
        kept = f": {len(rules)} rules looked at, all kept" if rules else ""
        context.say(f"allowed{kept}")
    else:
        error = from_wire(answer.get("error"))
        context.say(f"refused: {safe(error.sentence(), 800)}")
        if error.advice():
            context.say(f"  {safe(error.advice(), 400)}")
    if rules:
        output.rule_table(context, rules)
