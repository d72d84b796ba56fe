"""Opens ``tokenizer.json`` with the special tokens that the files beside it name.

The rules are those of transformers' ``PreTrainedTokenizerFast.from_pretrained``: the tokens of
``tokenizer_config.json`` count, and where it has no ``added_tokens_decoder``, so do the older files
``special_tokens_map.json`` and ``added_tokens.json``. Named tokens that the tokenizer lacks are
added to it, in the order transformers adds them, so that ids agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from trimode.runtime.text.files import guarded, read_object, read_source, unusable

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _EXTRA_BEFORE_V5 = "extra_special_tokens", "additional_special_tokens"
_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken


@dataclass
class SpecialTokens:
    """Holds the tokens that the files beside ``tokenizer.json`` name.

    Attributes:
        named: Tokens by their use (``bos_token``, ...), the model's own kinds included.
        extra: Tokens without a name.
        added: Tokens by id, as the files say.
    """

    named: dict[str, Token] = field(default_factory=dict)
    extra: list[Token] = field(default_factory=list)
    added: dict[int, AddedToken] = field(default_factory=dict)

    def texts(self) -> dict[str, str]:
        """Return what a chat template sees under each name."""
        return {name: str(token) for name, token in self.named.items()}


def open_tokenizer(folder: Path, config: dict[str, Any]) -> tuple[Tokenizer, SpecialTokens]:
    """Open a folder's tokenizer.

    Args:
        folder: Folder with ``tokenizer.json``.
        config: Contents of ``tokenizer_config.json``.

    Returns:
        The tokenizer, which neither cuts nor pads, and its special tokens.

    Raises:
        BundleError: a file cannot be used.
    """
    file = folder / "tokenizer.json"
    source = read_source(file, "a tokenizer")
    tokenizer = guarded(file, "a tokenizer", lambda: Tokenizer.from_str(source))
    tokens = read_special_tokens(folder, config, tokenizer)
    settings = folder / "tokenizer_config.json"
    guarded(settings, "tokens that can be added", lambda: _add(tokenizer, tokens))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    return tokenizer, tokens


def read_special_tokens(
    folder: Path, config: dict[str, Any], tokenizer: Tokenizer
) -> SpecialTokens:
    """Collect the special tokens of a folder.

    Raises:
        BundleError: a file cannot be used.
    """
    config = dict(config)
    if _EXTRA_BEFORE_V5 in config and not config.get(_EXTRA):
        config[_EXTRA] = config.pop(_EXTRA_BEFORE_V5)
    own = _take_own_names(config)
    if "added_tokens_decoder" in config:
        added = _added_by_config(folder, config["added_tokens_decoder"])
    else:
        _merge_map(folder, config, own)
        added = [*_added_before_v5(folder, config), *tokenizer.get_added_tokens_decoder().items()]
    if tokenizer.padding is not None:
        config.setdefault("pad_token", tokenizer.padding["pad_token"])
    if _EXTRA_BEFORE_V5 in config:
        config.setdefault(_EXTRA, config[_EXTRA_BEFORE_V5])
    return _collect(folder, config, own, added)


def _take_own_names(config: dict[str, Any]) -> dict[str, Any]:
    """Take out this model's own kinds of special token, like ``image_token``."""
    names = [n for n, value in config.items() if _is_own(n) and isinstance(value, str)]
    own = {name: config.pop(name) for name in names}
    if isinstance(config.get(_EXTRA), dict):
        own |= config.pop(_EXTRA)
    return own


def _is_own(name: str) -> bool:
    return name.endswith("_token") and name not in NAMES


def _added_by_config(folder: Path, tokens: Any) -> list[tuple[int, AddedToken]]:
    file = folder / "tokenizer_config.json"
    found = "added_tokens_decoder of another form"
    if not isinstance(tokens, dict):
        raise unusable(file, "added tokens by id", found)
    try:
        added = [(int(index), _token(token)) for index, token in tokens.items()]
    except (TypeError, ValueError) as error:
        raise unusable(file, "added tokens by id", found) from error
    return [(i, t if isinstance(t, AddedToken) else AddedToken(t)) for i, t in added]


def _merge_map(folder: Path, config: dict[str, Any], own: dict[str, Any]) -> None:
    """Lay ``special_tokens_map.json`` over the configuration."""
    for name, value in read_object(folder / "special_tokens_map.json").items():
        if name == _EXTRA and isinstance(value, list):
            before = list(config.get(_EXTRA) or [])
            config[_EXTRA] = before + [_as_special(one) for one in value if one not in before]
        elif name != _EXTRA:
            config[name] = _as_special(value)
        else:
            config[name] = value
    if isinstance(config.get(_EXTRA), dict):
        own |= config.pop(_EXTRA)


def _as_special(value: Any) -> Any:
    return value | {"special": True} if isinstance(value, dict) else value


def _added_before_v5(folder: Path, config: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """Read ``added_tokens.json``; tokens that the configuration names are special."""
    file = folder / "added_tokens.json"
    special = {_text(config[name]) for name in NAMES if config.get(name)}
    extra = config.get(_EXTRA)
    special |= {_text(one) for one in extra} if isinstance(extra, list) else set()
    added = []
    for text, index in read_object(file).items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise unusable(file, "an id for each token", f"{index!r} for {text!r}")
        added.append(
            (index, AddedToken(text, normalized=text not in special, special=text in special))
        )
    return added


def _collect(
    folder: Path, config: dict[str, Any], own: dict[str, Any], added: list[tuple[int, AddedToken]]
) -> SpecialTokens:
    others = {name: config[name] for name in config if _is_own(name) and _is_token(config[name])}
    values = {name: config.get(name) for name in NAMES} | others | own
    # those, too, whose id another one has taken
    by_text = {token.content: token for _, token in added}
    named: dict[str, Token] = {}
    extra: list[Token] = []
    name = _EXTRA
    try:
        for name, value in values.items():
            if value is not None:
                token = _token(value)
                named[name] = by_text.get(str(token), token) if name in NAMES else token
        name = _EXTRA
        extra = [_token(value) for value in _listed(config.get(_EXTRA))]
    except (TypeError, ValueError) as error:
        file = folder / "tokenizer_config.json"
        raise unusable(file, "special tokens that are texts", f"another {name}") from error
    return SpecialTokens(named, extra, dict(added))


def _add(tokenizer: Tokenizer, tokens: SpecialTokens) -> None:
    """Add to the tokenizer what it lacks, or has with other flags."""
    present = tokenizer.get_added_tokens_decoder().values()
    same = {repr(token) for token in present}
    new: list[Token] = [t for _, t in sorted(tokens.added.items()) if repr(t) not in same]
    known = {token.content for token in present} | {str(token) for token in new}
    for token in (*tokens.named.values(), *tokens.extra):
        if str(token) not in known and token not in new:
            new.append(token)
    names = set(tokens.texts().values())
    if new:
        tokenizer.add_tokens([_as_added(token, names) for token in new])


def _as_added(token: Token, names: Iterable[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and token.content in names:
        token.special = True
    return token


def _token(value: Any) -> Token:
    """Make the token that a file describes by text or object.

    An object has flags beside the text.
    """
    if isinstance(value, dict):
        return AddedToken(**{name: value[name] for name in _FIELDS if name in value})
    if not isinstance(value, str | AddedToken):
        raise TypeError(type(value).__name__)
    return value


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _text(value: Any) -> str:
    """Return a token's text if transformers knows it before ``__type``."""
    if isinstance(value, dict):
        return "" if "__type" in value else str(value.get("content", ""))
    return str(value)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise TypeError(type(value).__name__)
    return value
