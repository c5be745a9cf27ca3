"""The library names options as Python spells them; here they become the flags of a command."""

import re

import click

PARAMETER = re.compile(r"`([a-z_]+)`")
"""How the library writes the name of a parameter in errors, notes and tables."""


def with_flags(text: str, command: click.Command | None = None) -> str:
    """Return ``text`` with --vocab-size in place of vocab_size between backticks, and so on.

    A name in backticks that is no parameter of any command stays as it is.

    Args:
        text: What the library says.
        command: Whose flags come first; None is the command that runs.
    """
    context = click.get_current_context()
    flags = all_flags(context.find_root().command) | all_flags(command or context.command)
    return PARAMETER.sub(lambda found: flags.get(found[1], found[0]), text)


def all_flags(command: click.Command) -> dict[str, str]:
    """Parameter → flag of ``command`` and of the commands below it.

    A parameter is known by the name of its flag and by the name under which click hands it over:
    ``width`` and ``widths`` are both --width.
    """
    flags: dict[str, str] = {}
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            flags |= all_flags(inner)
    for option in command.params:
        if isinstance(option, click.Option) and option.name:
            flag = max(option.opts, key=len)
            flags |= {option.name: flag, flag.lstrip("-").replace("-", "_"): flag}
    return flags
