# SPDX-License-Identifier: Apache-2.0
"""The declarative base of the builders: a dataclass is an XML element, each field says where its value goes.

::

    @dataclass(frozen=True, kw_only=True)
    class Rng(Element):
        TAG = "rng"
        model: Annotated[str, At("@model")] = "virtio"
        backend: Annotated[str, At("backend/@model")] = "random"
        source: Annotated[str | None, At("backend")] = None

renders ``<rng model="virtio"><backend model="random">/dev/urandom</backend></rng>``. A path's steps are child elements,
made once and shared by the fields that name them; it ends in an attribute or in the last child's text. None is left
out; True is an empty element (or "yes" as an attribute), False leaves the element out (or "no"). An `Element`, or a
tuple of them, is appended under the path (``At("")``: right here); an empty tuple is left out, path and all. Only
ElementTree makes markup: no value becomes any.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, get_args, get_origin, get_type_hints
from xml.etree import ElementTree


@dataclass(frozen=True, slots=True)
class At:
    """Where a field's value goes, from its element: ``@attribute``, ``child/@attribute``, ``child`` or nothing."""

    path: str


class Element:
    """Base of the builders' dataclasses."""

    TAG: ClassVar[str]

    def render(self) -> ElementTree.Element:
        """The element. Raises TypeError for a field without `At` or with a value that has no XML form."""
        root = ElementTree.Element(self.TAG)
        for name, path in _paths(type(self)):
            value = getattr(self, name)
            if value is not None:
                _place(root, path, value)
        return root


def _paths(kind: type[Element]) -> tuple[tuple[str, str], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((entry.name, _path_of(kind, entry.name, hints[entry.name])) for entry in fields(kind))  # type: ignore[arg-type]


def _path_of(kind: type[Element], name: str, hint: object) -> str:
    if get_origin(hint) is Annotated:
        for extra in get_args(hint)[1:]:
            if isinstance(extra, At):
                return extra.path
    raise TypeError(f"{kind.__name__}.{name} does not say where it goes")


def _place(root: ElementTree.Element, path: str, value: object) -> None:
    steps, _, attribute = path.partition("@")
    if value == ():
        return
    if isinstance(value, Element | tuple):
        parent = _descend(root, steps)
        for child in value if isinstance(value, tuple) else (value,):
            parent.append(child.render())
    elif attribute:
        _descend(root, steps).set(attribute, _text(value))
    elif value is True:
        _descend(root, steps)
    elif value is not False:
        _descend(root, steps).text = _text(value)


def _descend(node: ElementTree.Element, steps: str) -> ElementTree.Element:
    for step in filter(None, steps.split("/")):
        child = node.find(step)
        node = ElementTree.SubElement(node, step) if child is None else child
    return node


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int):
        return str(value)
    raise TypeError(f"{value!r} has no XML form")
