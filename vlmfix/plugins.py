"""Methods and tasks of other packages, found by the entry points that these packages declare.

What cannot be used is told with the package's name and the way out, and stops nothing else.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PlugIn", "PlugIns", "find_plug_ins"]

#: Names stand in specs ("a+b:x=1"), in names of files and in lists with commas.
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class PlugIn:
    """One class of another package.

    Args:
        kind: the class.
        target: where it is imported from, "module:Class".
        package: name and version of the package.
    """

    kind: Any
    target: str
    package: str


@dataclass(frozen=True)
class PlugIns:
    """The entry points of one group.

    Args:
        found: name -> what can be used.
        broken: name -> why it cannot be used, and the way out.
    """

    found: Mapping[str, PlugIn]
    broken: Mapping[str, str]

    def warn(self) -> None:
        """Warn of everything that cannot be used."""
        for reason in self.broken.values():
            warnings.warn(reason, stacklevel=3)


def find_plug_ins(
    group: str, taken: Collection[str], fault: Callable[[Any], str | None]
) -> PlugIns:
    """Import the classes that entry points of this group name.

    Args:
        group: such as "vlmfix.methods".
        taken: names that vlmfix itself uses.
        fault: imported object -> what is wrong with it; None: nothing.
    """
    from importlib.metadata import entry_points

    found: dict[str, PlugIn] = {}
    broken: dict[str, str] = {}
    for point in entry_points(group=group):
        package = point.dist.name if point.dist else "an unnamed package"
        reason = None
        if _NAME.fullmatch(point.name) is None:
            reason = "a name is lower-case letters, digits and _, a letter first: rename it"
        elif point.name in taken:
            reason = "vlmfix has one of that name: rename it"
        elif point.name in found:
            reason = f"{found[point.name].package} has one of that name: uninstall one of the two"
        else:
            try:
                kind = point.load()
            except Exception as error:  # a module of another package may raise anything
                reason = f"importing {point.value} fails with {type(error).__name__}: {error}"
            else:
                reason = fault(kind)
                if reason is None and getattr(kind, "name", None) != point.name:
                    reason = f"the entry point and {point.value}.name differ: make them the same"
        if reason is None:
            version = point.dist.version if point.dist else ""
            target = f"{point.module}:{point.attr}"
            found[point.name] = PlugIn(kind, target, f"{package} {version}".strip())
        else:
            broken.setdefault(
                point.name,
                f"{group}: {point.name!r} of the package {package} cannot be used, all else can: "
                f"{reason}. Repair the package, or take it away: pip uninstall {package}",
            )
    return PlugIns(found, broken)
