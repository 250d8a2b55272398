# SPDX-License-Identifier: Apache-2.0
"""Hostile text: names refuse it, labels and user data carry it verbatim."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from ppec_contract.api_catalogue import FlavorCreate
from ppec_contract.api_hosts import HostCreate
from ppec_contract.api_vms import VmsCreate
from ppec_contract.errors import PpecError
from ppec_contract.frames import decode_json_object, encode
from ppec_contract.model import MAX_USER_DATA_BYTES, Model
from ppec_contract.validation import parse

# fmt: off
_SEEDS = {
    "xml": [
        '<a/>', '</name>', '<![CDATA[x]]>', '&amp;', '&xxe;', '<!DOCTYPE a>', '<?xml?>', "'><b a='",
        '"><b a="', ']]>',
    ],
    "yaml": [
        'a: b', '- a', '!!python/object/apply:os.system', '&a *a', '<<: *x', '{a: b}', '? x', '# x', '%YAML',
        '~',
    ],
    "jinja": [
        '{{ 1 }}', '{% raw %}', '{# x #}', "{{ lookup('pipe','id') }}", '${{ x }}', "{{''.__class__}}",
        '{%x%}',
    ],
    "shell": [
        '$(id)', '`id`', ';id', '|id', '&id', 'a b', 'a\tb', '$HOME', '${IFS}', '>x', '<x', '*', '?', '!x',
        "'", '"',
    ],
    "path": [
        '../x', '/etc/passwd', '..', '.', './x', 'a/b', '~root', '%2e%2e', '\\\\x', 'a\\b', 'C:', 'a/../b',
        'file:x',
    ],
    "newline": [
        'a\nb', 'a\rb', '\n', 'a\n', '\na', 'a\r\nb', 'a\u2028b', 'a\x85b', 'a\x0bb', 'a\x0cb',
    ],
    "odd": [
        '\x00', 'a\x00', '\x1b[31m', '\x7f', 'é', 'Ａ', 'а', '\u202ea', '\u200b', '🦊', '%s', '%n', '{0}', 'A',
        '_', '-',
    ],
    "edge": [
        '-a', 'a-', "a" * 64, "a" * 5000, '', ' ', ' a', 'a ', 'a.b', 'a_b', 'None;', 'a,b', 'a=b', 'a@b',
        'a:b', '+a',
    ],
}
# fmt: on
# Before, behind, within and beside an ordinary name.
_PLACES = (("", ""), ("a", ""), ("", "a"), ("web-1", ""), ("a", "b"), ("web", "-1"))
_LABEL = set("abcdefghijklmnopqrstuvwxyz0123456789-")


def _hostile() -> list[str]:
    seeds = [*itertools.chain.from_iterable(_SEEDS.values())]
    found = {before + seed + behind for seed in seeds for before, behind in _PLACES}
    # A few combinations become plain DNS labels ("a" + "-" + "b"); those are names like any other.
    labels = {t for t in found if 0 < len(t) <= 63 and set(t) <= _LABEL and t[0] != "-" and t[-1] != "-"}
    return sorted(found - labels)


HOSTILE = _hostile()
NAME_ONLY_DOTTED = {text for text in HOSTILE if set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._")}
PRINTABLE = [text for text in HOSTILE if all(ord(c) >= 0x20 and ord(c) != 0x7F for c in text)]


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 500


def refused(model: type[Model], value: dict[str, Any]) -> PpecError:
    with pytest.raises(PpecError) as caught:
        parse(model, value)
    assert caught.value.code == "request.invalid"
    # The problem is writable as JSON, and does not repeat the text.
    caught.value.problem().model_dump_json()
    return caught.value


def test_vm_names_refuse_all_of_it() -> None:
    for text in HOSTILE:
        error = refused(VmsCreate, {"flavor": "small", "image": "tiny", "name": text})
        assert error.details["faults"][0]["field"] == "name"
        refused(VmsCreate, {"flavor": "small", "image": "tiny", "names": ["ok", text]})


def test_names_of_resources_refuse_all_of_it() -> None:
    for text in HOSTILE:
        if text in NAME_ONLY_DOTTED:
            continue  # dots and underscores are allowed inside; what they may do is tested below
        refused(FlavorCreate, {"name": text, "vcpus": 2, "memory_mib": 512, "disk_mib": 512})
        refused(HostCreate, {"name": text, "rack": "r1", "vrf": "v", "address": "10.0.0.1"})
        refused(VmsCreate, {"flavor": text, "image": "tiny"})


@pytest.mark.parametrize("name", ["..", ".", ".a", "a.", "../a", "_a", "a_", "-"])
def test_a_resource_name_is_never_a_path(name: str) -> None:
    refused(FlavorCreate, {"name": name, "vcpus": 2, "memory_mib": 512, "disk_mib": 512})


def test_user_data_is_carried_verbatim() -> None:
    for text in HOSTILE:
        if "\x00" in text:
            refused(VmsCreate, {"flavor": "s", "image": "t", "user_data": text})
            continue
        request = parse(VmsCreate, {"flavor": "s", "image": "t", "user_data": text})
        assert request.user_data == text
        assert decode_json_object(encode(request.model_dump(mode="json"))[:-1])["user_data"] == text
        assert json.loads(request.model_dump_json())["user_data"] == text


def test_labels_are_carried_verbatim_or_refused_for_control_characters() -> None:
    for text in HOSTILE:
        value = {"flavor": "s", "image": "t", "labels": {"k": text}}
        if text not in PRINTABLE or len(text) > 256:
            refused(VmsCreate, value)
            continue
        assert parse(VmsCreate, value).labels == {"k": text}
        if "=" in text:
            refused(VmsCreate, {"flavor": "s", "image": "t", "labels": {text[:64]: "v"}})
        elif 0 < len(text) <= 64:
            labelled = parse(VmsCreate, {"flavor": "s", "image": "t", "labels": {text: text}})
            assert decode_json_object(encode(labelled.model_dump(mode="json"))[:-1])["labels"] == {text: text}


def test_user_data_is_bounded_in_bytes() -> None:
    assert parse(VmsCreate, {"flavor": "s", "image": "t", "user_data": "é" * (MAX_USER_DATA_BYTES // 2)})
    refused(VmsCreate, {"flavor": "s", "image": "t", "user_data": "é" * (MAX_USER_DATA_BYTES // 2) + "x"})


def test_half_a_surrogate_pair_is_refused_wherever_it_stands() -> None:
    base = {"flavor": "s", "image": "t"}
    for extra in ({"user_data": "\ud800"}, {"labels": {"k": "\udfff"}}, {"labels": {"\ud800": "v"}}, {"\ud800": 1}):
        refused(VmsCreate, base | extra)


def test_the_name_of_an_unknown_field_is_cut_short() -> None:
    error = refused(VmsCreate, {"flavor": "s", "image": "t", "x" * 1_000_000: 1})
    assert len(error.problem().model_dump_json()) < 2000
