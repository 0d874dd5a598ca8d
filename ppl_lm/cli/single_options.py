"""`Command`: a command each of whose options is given once."""

from typing import Any

import typer
from typer.core import TyperCommand

INSTEAD = {
    "--prompts": "; write all prompts into one file",
}


class Command(TyperCommand):
    """A command that refuses an option given twice, of whose values the last would win without a word. Its function gets the
    context that it asks for, a `typer.Context`; typer passes the one it derives from."""

    context_class = typer.Context

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = [option for option in self.make_parser(ctx).parse_args(list(args))[2] if _takes_one_value(option)]
        if twice := next((option for option in given if given.count(option) > 1), None):
            name = twice.opts[0]
            ctx.fail(
                f"{name} is given {given.count(twice)} times, but takes one value: give it once{INSTEAD.get(name, '')}"
            )
        return super().parse_args(ctx, args)


def _takes_one_value(parameter: Any) -> bool:
    return parameter.param_type_name == "option" and not (parameter.is_flag or parameter.multiple or parameter.count)
