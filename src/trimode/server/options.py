"""Holds a server's options, from the command line or a file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from trimode.errors import UsageError
from trimode.formats.contract import Mode
from trimode.formats.texts import reason_of
from trimode.server.limits import Limits


@dataclass(frozen=True)
class ServeOptions:
    """Holds the options of ``trimode serve``; a file has the same names.

    Attributes:
        host: Address to listen on.
        port: Port; 0 = any free one.
        api_key_file: File with one API key a line; None = everybody may ask.
        served_model_name: Name of the model; None = the bundle's folder.
        mode: Mode of requests that name none.
        precision: Precision to run; None = the first one built.
        target: Target to run on; None = the one that fits this machine.
        threads: Threads per operator; None = one for each core.
        max_rows: Most texts that run at a time; None = 8, or what the target was built for.
        max_queue: Most texts that wait for a row.
        kv_bytes: Most bytes of host memory for computed prefixes; None = 1 GiB.
        drain_timeout: Most seconds for requests at work once the server is to stop.
        log_format: Form of the log's lines, ``text`` or ``json``.
        log_prompts: Whether prompts and answers are logged.
        otlp_traces_endpoint: URL that takes traces over OTLP; None = no traces.
        watch: Whether the page ``/watch`` is served.
        limits: Bounds of requests; a table of its own in a file.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None
    served_model_name: str | None = None
    mode: Mode = "auto"
    precision: str | None = None
    target: str | None = None
    threads: int | None = None
    max_rows: int | None = None
    max_queue: int = 256
    kv_bytes: int | None = None
    drain_timeout: float = 30.0
    log_format: str = "text"
    log_prompts: bool = False
    otlp_traces_endpoint: str | None = None
    watch: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"expected `port` from 0 to 65535, found {self.port}", "8000 is usual")
        if self.log_format not in ("text", "json"):
            raise UsageError(
                f"expected `log_format` text or json, found {self.log_format!r}",
                "text is for people, json for programs",
            )
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise UsageError(
                f"expected `otlp_traces_endpoint` to be a URL, found {endpoint!r}",
                "http://localhost:4318/v1/traces is usual",
            )
        if not 0 <= self.drain_timeout <= 86400:
            raise UsageError(
                f"expected `drain_timeout` from 0 to 86400 seconds, found {self.drain_timeout:g}",
                "30 is usual",
            )


def read_options(path: Path | None, given: Mapping[str, Any]) -> ServeOptions:
    """Lay given options over those of a file.

    Args:
        path: TOML file; None = none.
        given: Options by name, without those that were not given.

    Raises:
        UsageError: the file cannot be read, or has an unknown name or a value of another type.
    """
    found = {} if path is None else _ConfigFile(path).options()
    return ServeOptions(**{**found, **given})


class _ConfigFile:
    """Reads a file, and says in which line something is wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._source = path.read_text(encoding="utf-8")
            self._values = tomllib.loads(self._source)
        except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(
                f"{path}: expected a TOML file, found: {reason_of(error)}",
                "see docs/guides/serve.md for an example",
            ) from error

    def options(self) -> dict[str, Any]:
        """Return the options of the file, in plain types."""
        values = dict(self._values)
        limits = values.pop("limits", None)
        found = self._checked(values, ServeOptions)
        if limits is not None:
            if not isinstance(limits, dict):
                raise self._wrong("limits", "a table", limits)
            found["limits"] = replace(Limits(), **self._checked(limits, Limits))
        return found

    def _checked(self, values: dict[str, Any], kind: type) -> dict[str, Any]:
        hints = get_type_hints(kind)
        known = {one.name for one in fields(kind)} - {"limits"}
        found = {}
        for written, value in values.items():
            name = written.replace("-", "_")
            if name not in known:
                where = f"{self._path}, line {self._line(written)}"
                raise UsageError(
                    f"{where}: expected an option of the server, found {written!r}",
                    f"known are {', '.join(sorted(known))}",
                )
            found[name] = self._value(written, value, hints[name])
        return found

    def _value(self, written: str, value: Any, hint: Any) -> Any:
        if hint is Mode:
            value = value.replace("-", "_") if isinstance(value, str) else value
            if value in get_args(Mode):
                return value
            raise self._wrong(written, f"one of {', '.join(get_args(Mode))}", value)
        kinds = get_args(hint) or (hint,)
        if type(value) is int and float in kinds:
            return float(value)
        if type(value) in kinds:
            return value
        names = " or ".join(_WORDS[kind] for kind in kinds if kind in _WORDS)
        raise self._wrong(written, names, value)

    def _wrong(self, written: str, expected: str, value: Any) -> UsageError:
        where = f"{self._path}, line {self._line(written)}"
        return UsageError(f"{where}: expected {written} to be {expected}, found {value!r}")

    def _line(self, written: str) -> int:
        pattern = re.compile(rf"^\s*\[?\s*[\"']?{re.escape(written)}[\"']?\s*[=\].]")
        lines = self._source.splitlines()
        return next((n for n, line in enumerate(lines, 1) if pattern.match(line)), 1)


_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
