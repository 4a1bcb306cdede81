"""An option that is given twice: the last one counts, as everywhere, but not without a word."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from rpb_retrofit.cli.outputs import say


class Command(TyperCommand):
    """A command that names the options which another one of the same name beats."""

    def make_parser(self, ctx: Any) -> Any:
        """Typer's parser, which also hands out the options in the order in which they came, repeated ones included."""
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            values, rest, order = parse(args=args)
            options: list[Any] = [option for option in order if option.param_type_name == "option"]
            single = [option for option in options if not option.multiple and not option.is_flag]
            for option in dict.fromkeys(single):
                if (times := single.count(option)) > 1:
                    say(f"note: {option.opts[0]} is given {times} times: the last one counts, {values[option.name]}")
            return values, rest, order

        parser.parse_args = parse_args
        return parser
