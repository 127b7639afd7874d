# SPDX-License-Identifier: Apache-2.0
"""Shortens jsonargparse's messages about a configuration to one sentence."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable

import lightning.pytorch as pl

from lightning_moefold import callbacks
from lightning_moefold.recipes.data import TextData
from lightning_moefold.recipes.module import FineTuneModule
from lightning_moefold.strategy import MoEFoldStrategy

_SECTIONS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler", "ckpt_path")
_OWNERS = {"model": FineTuneModule, "data": TextData, "trainer": pl.Trainer, "trainer.strategy": MoEFoldStrategy}
#: Sections whose keys a command lists.
_HELPS = ("model", "data", "trainer.strategy")
_UNKNOWN_OPTION = r"([\w.]+): Option '(\w+)' is not accepted$|unrecognized arguments: --([\w.]+)\.(\w+)"

#: Lightning's messages by callback: the metric, and the list of those that were logged.
_UNLOGGED = {
    "EarlyStopping": r"Early stopping conditioned on metric `([^`]+)`.*following: (.*)",
    "ModelCheckpoint": r"`ModelCheckpoint\(monitor='([^']+)'\)` could not find.*?metrics: \[(.*?)\]",
}
_SHOWN = 5


def one_sentence(message: str) -> str:
    """Returns the reason of an error, with the known name that is most similar to an unknown one."""
    sentence = _reason(message)
    if close := _closest(sentence):
        return f"{sentence}; did you mean {close}?"
    unknown = re.match(_UNKNOWN_OPTION, sentence)
    section = unknown and (unknown[1] or unknown[3])
    return f"{sentence}; --{section}.help lists the known ones" if section in _HELPS else sentence


def unlogged(message: str) -> str | None:
    """Shortens Lightning's messages about a monitored metric that was never logged; returns None for other messages."""
    for callback, pattern in _UNLOGGED.items():
        if found := re.match(pattern, message, re.DOTALL):
            name, known = found[1], re.findall(r"[`']([^`']+)[`']", found[2])
            close = _most_like(name, known)
            others = [other for other in known if not other.startswith(("moe/", "lr-"))][:_SHOWN]
            more = " and others" if len(others) < len(known) else ""
            hint = f"did you mean {close}?" if close else f"logged are {', '.join(others)}{more}." if others else ""
            return f"{callback} monitors {name}, which was never logged; {hint or 'log it with self.log.'}"
    return None


def _closest(sentence: str) -> str | None:
    """Returns the known option, key or class that is most similar to an unknown one in the sentence; or None."""
    if unknown := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", sentence):
        return _most_like(unknown[2], dir(importlib.import_module(unknown[1])))
    if unknown := re.fullmatch(r"Subcommand '\w+' does not accept option '(\w+)(?:\.(\w+))?.*'", sentence):
        section, name = unknown.groups()
        if section not in _SECTIONS:
            return _most_like(section, _SECTIONS)
    elif unknown := re.fullmatch(r"trainer\.callbacks: Option '(\w+)' is not accepted", sentence):
        ours = (getattr(callbacks, name) for name in callbacks.__all__)
        return _most_like(unknown[1], [name for kind in ours for name in inspect.signature(kind).parameters])
    elif unknown := re.match(_UNKNOWN_OPTION, sentence):
        section, name = (found for found in unknown.groups() if found)
    else:
        return None
    return _most_like(name, inspect.signature(_OWNERS[section]).parameters) if name and section in _OWNERS else None


def _most_like(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that is most similar to one that is unknown, or of which it has the initials: ``lr``."""
    names = list(known)
    initials = (other for other in names if "_" in other and "".join(word[:1] for word in other.split("_")) == name)
    return next(iter([*difflib.get_close_matches(name, names, 1), *initials]), None)


def _reason(message: str) -> str:
    """Extracts the reason from a message of jsonargparse, which lists every possible type over several lines."""
    text = re.sub(r"\s+", " ", message.replace("typing.", "")).strip()
    text = re.sub(r"- Not a valid subclass of .*?\(implicit class_path\) ?", "", text)  # applies to any class path
    text = re.sub(r"Problem with given class_path '[^']*': ", "", text)
    key = ""
    while True:
        if named := re.match(r'Parser key "([^"]+)": ', text):
            key, text = f"{key}.{named[1]}".lstrip("."), text[named.end() :]
        if "Errors: - " not in text or not text.startswith("Does not validate"):
            break
        reasons, _, value = text.partition("Errors: ")[2].rpartition(" Given value: ")
        reasons = reasons.rpartition(" Given value type: ")[0]
        # What remains without "Expected a <class 'str'>" and the like is more informative.
        special = re.sub(rf"^({_WRONG_TYPE} )*|( {_WRONG_TYPE})*$", "", reasons)
        if re.fullmatch(_WRONG_TYPE, special):
            text = f"{value} is not {_kinds(reasons)}"
            break
        text = special.removeprefix("- ")
    if expected := re.fullmatch(r"(Expected .*?)\. Got value: (.*)", text):
        text = f"{expected[2]} is not {_kinds(expected[1])}"
    return f"{key}: {text}" if key else text


def _kinds(expected: str) -> str:
    kinds = re.findall(r"Expected (?:a )?(?:<class '([\w.]+)'>|(\w+\[[^]]*\]))", expected)
    return " or ".join(a or b for a, b in kinds).replace("NoneType", "null")


_WRONG_TYPE = r"- Expected (?:a )?(?:<class '[\w.]+'>|\w+\[[^]]*\])(?:\. Got value: (?:(?! - ).)*)?"
