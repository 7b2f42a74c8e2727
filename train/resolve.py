"""From a recipe (TOML), a DeepSpeed file (JSON) and `--set` to a checked `Config`, before anything heavy is imported.

A recipe owns data, model, optimizer, schedule and run and holds only what differs from the defaults. The DeepSpeed file
owns batch, precision and clipping. `--set section.key=value` overrides one key of the recipe, `--set ds.key=value` one
of the DeepSpeed file. An unknown key, one on the wrong side, a wrong type or an impossible value is a ValueError of one
line.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from math import inf
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from model.methods import METHODS
from model.speed import SpeedOptions
from train.config import (
    Batch,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    allow,
)

ROOT = Path(__file__).resolve().parents[1]
RECIPES = Path(__file__).parent / "recipes"
DEEPSPEED_FILE = ROOT / "ds_config.json"

SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "train": TrainConfig,
    "speed": SpeedOptions,
    "run": RunConfig,
}
_DEFAULT_METHOD = ModelConfig().method

# What of DeepSpeed's configuration works with this trainer: key → type, or the fields of a section. DeepSpeed itself
# takes any other top-level key in silence. Its default for gradient_clipping is 1.0; ours is the published none.
DEEPSPEED_DEFAULTS: dict[str, Any] = {
    "gradient_clipping": 0.0,
    "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    "zero_optimization": {"stage": 0},
}
DEEPSPEED_KEYS: dict[str, Any] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_clipping": float,
    "torch_autocast": {"enabled": bool, "dtype": str},
    "zero_optimization": {"stage": int},
    "bf16": {"enabled": bool},
    "fp16": {"enabled": bool},
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "wall_clock_breakdown": bool,  # shown with log_level info
    "log_level": str,
}
MAX_BYTES = 2**20  # of a recipe or a DeepSpeed file; those here have 2 kB
_SHOWN_RECIPES = 10  # of more than fifty
_ONLY_IN_RECIPES = {"scheduler": "section [schedule]", "lr": "optimizer.lr", "learning_rate": "optimizer.lr"}


def load_config(
    recipe: str, overrides: Iterable[str] = (), deepspeed_file: str | None = None, *, needs_data: bool = True
) -> Config:
    """Reads and resolves a run.

    Args:
        recipe: path of a TOML file, or the name of one in train/recipes.
        overrides: `section.key=value` and `ds.key=value` in TOML's syntax; a bare word is text.
        deepspeed_file: path of a DeepSpeed JSON; else what the recipe names, else ds_config.json at the root.
        needs_data: whether the recipe or an override must name a set.

    Raises:
        ValueError, OSError: with one line that names the key, what was given and what is allowed.
    """
    path = find_recipe(recipe)
    document = _parse_toml(path)
    named = document.pop("deepspeed_config", None)
    if named is not None and not isinstance(named, str):
        raise ValueError(f"{path}: deepspeed_config = {named!r}; allowed is the path of a JSON file")
    table = {(section, key): (value, str(path)) for section, key, value in _flatten(document, str(path))}
    deepspeed_path = Path(deepspeed_file) if deepspeed_file else path.parent / named if named else DEEPSPEED_FILE
    deepspeed = _read_json(deepspeed_path)
    own_method, _ = table.get(("model", "method"), (_DEFAULT_METHOD, ""))
    _override(table, deepspeed, overrides)
    _leave_out_options(table, own_method, str(path))
    out, where = table.get(("run", "out"), ("", str(path)))
    table["run", "out"] = f"runs/{path.stem}" if out == "" else out, where
    config = _build_config(table, _check_deepspeed(deepspeed, str(deepspeed_path)))
    if needs_data and not config.data.shards:
        raise ValueError(f"{path} names no data: add --set data.shards=FOLDER, made by tools/make_shards.py")
    return config


def config_from_dict(document: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """The configuration whose `as_dict` is given, of run.json or of a checkpoint's state.json, with `overrides` as in
    `load_config`.

    Raises ValueError, as `load_config` does, for what is no recipe; keys that are not there have their defaults.
    """
    where = "config"
    sections = json.loads(json.dumps(document))  # a copy, for overrides go into it
    deepspeed = sections.pop("deepspeed", {})
    if not isinstance(deepspeed, dict):
        raise ValueError(f"{where}: deepspeed = {json.dumps(deepspeed)}; allowed is a DeepSpeed document")
    table = {(section, key): (value, where) for section, key, value in _flatten(sections, where)}
    _override(table, deepspeed, overrides)
    return _build_config(table, _check_deepspeed(deepspeed, f"{where}: deepspeed"))


def _override(
    table: dict[tuple[str, str], tuple[Any, str]], deepspeed: dict[str, Any], overrides: Iterable[str]
) -> None:
    """Puts each `--set` into the recipe's (section, key) → (value, where it was given), or the DeepSpeed document."""
    for override in overrides:
        keys, value = parse_override(override)
        where = f"--set {override}"
        if keys[0] == "ds":
            _put(deepspeed, keys[1:], value, where)
        elif len(keys) == 2:
            table[keys[0], keys[1]] = value, where
        else:
            raise ValueError(f"{where}: a key is section.key, such as optimizer.lr, or ds.key" + _hint(keys[-1]))


def _leave_out_options(table: dict[tuple[str, str], tuple[Any, str]], own_method: str, path: str) -> None:
    """Where --set chose another method than the recipe's, removes the options in the recipe that are its own method's
    alone, and says so: `model.method` is all that has to change."""
    method, _ = table.get(("model", "method"), (own_method, ""))
    if method == own_method or any(not isinstance(name, str) or name not in METHODS for name in (method, own_method)):
        return
    keys = recipe_keys("model", own_method).keys() - recipe_keys("model", method).keys()
    left_out = sorted(key for key in keys if table.get(("model", key), (None, ""))[1] == path)
    for key in left_out:
        del table["model", key]
    if left_out and os.environ.get("RANK", "0") == "0":
        names = ", ".join(f"model.{key}" for key in left_out)
        print(f"{path}: left out {names}, which method {method} does not have", file=sys.stderr, flush=True)


def _build_config(table: Mapping[tuple[str, str], tuple[Any, str]], deepspeed: dict[str, Any]) -> Config:
    """From (section, key) → (value, where it was given), and a DeepSpeed document that has been checked."""
    given = table.get(("model", "method"))
    method = _DEFAULT_METHOD if given is None else _check_recipe_key("model", "method", *given, _DEFAULT_METHOD)
    ModelConfig(method=method)  # a ValueError, unless there is one of that name
    values: dict[str, dict[str, Any]] = {}
    for (section, key), (value, where) in table.items():
        values.setdefault(section, {})[key] = _check_recipe_key(section, key, value, where, method)
    model = values.setdefault("model", {})
    options = METHODS[method].options
    model["options"] = options(**{key: model.pop(key) for key in get_type_hints(options) if key in model})
    return Config(**{section: SECTIONS[section](**entries) for section, entries in values.items()}, deepspeed=deepspeed)


def find_recipe(recipe: str) -> Path:
    """A recipe by path or by name; FileNotFoundError names those that exist."""
    named = RECIPES / f"{recipe.removesuffix('.toml')}.toml"
    for path in (Path(recipe), named):
        if path.is_file():
            return path
    names = [path.stem for path in sorted(RECIPES.glob("*.toml"))]
    close = difflib.get_close_matches(Path(recipe).stem, names, n=_SHOWN_RECIPES, cutoff=0.0)
    more = " …" if len(names) > len(close) else ""
    raise FileNotFoundError(
        f"no such recipe: {recipe}; train/recipes has {', '.join(close)}{more} (python train/main.py lists all), or "
        "give a path"
    )


def list_recipes() -> str:
    """One line a recipe: its name and the first line of its comment."""
    paths = sorted(RECIPES.glob("*.toml"))
    width = max(len(path.stem) for path in paths)
    comments = [path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip() for path in paths]
    return "\n".join(f"  {path.stem:{width}}  {comment}" for path, comment in zip(paths, comments, strict=True))


def resolve_batch(deepspeed: Mapping[str, Any], world: int, *, in_pairs: bool = False) -> Batch:
    """Shares the global batch among `world` processes; the micro-batch shrinks to what divides a share, and is even
    where clips are mixed in pairs.

    Raises ValueError, naming sizes that work, where the processes cannot share it so.
    """
    total, micro = deepspeed["train_batch_size"], deepspeed["train_micro_batch_size_per_gpu"]
    share, rest = divmod(total, world)
    if rest:
        sizes = [size for size in (share * world, (share + 1) * world) if size]
        counts = [n for n in range(1, total + 1) if total % n == 0][:12]
        raise ValueError(
            f"train_batch_size = {total} cannot be shared equally by {world} processes: set it to "
            f"{' or '.join(map(str, sizes))} (--set ds.train_batch_size={sizes[-1]}), or start "
            f"{', '.join(map(str, counts))} processes"
        )
    sizes = [size for size in range(1, share + 1) if share % size == 0 and not (in_pairs and size % 2)]
    if not sizes:
        even = [size for size in (world * (share - 1), world * (share + 1)) if size]
        raise ValueError(
            f"train_batch_size = {total} gives each of {world} processes {share} clips, and mixup and cutmix take them "
            f"in pairs: set it to {' or '.join(map(str, even))} (--set ds.train_batch_size={even[-1]})"
        )
    fitting = max((size for size in sizes if size <= micro), default=0)
    if not fitting:
        raise ValueError(
            f"train_micro_batch_size_per_gpu = {micro}: mixup and cutmix take clips in pairs; set it to "
            f"{', '.join(map(str, sizes[:12]))} (--set ds.train_micro_batch_size_per_gpu={sizes[0]})"
        )
    of = f"a step of {total}" if world == 1 else f"a process's {share} of a step of {total}"
    reason = f"do not fit {of}" if share % micro else "cannot be mixed in pairs"
    note = "" if fitting == micro else f"{micro} clips at once {reason}: {fitting} are taken"
    return Batch(total, fitting, share // fitting, note)


@cache
def recipe_keys(section: str, method: str | None = None) -> dict[str, Any]:
    """Keys of a section of a recipe and their types; those of [model] for a method, or None: for all methods."""
    keys = get_type_hints(SECTIONS[section])
    if section == "model":
        del keys["options"]
        for name, entry in METHODS.items():
            keys |= get_type_hints(entry.options) if method in (None, name) else {}
    return keys


def _check_recipe_key(section: str, key: str, value: Any, where: str, method: str) -> Any:
    """The value in its field's type; ValueError for a key that is not there or a value of another type."""
    name = f"{section}.{key}"
    if section not in SECTIONS or key not in recipe_keys(section):
        known = [f"{s}.{k}" for s in SECTIONS for k in recipe_keys(s, method)]
        if key in DEEPSPEED_KEYS or section in DEEPSPEED_KEYS:
            moved = key if key in DEEPSPEED_KEYS else name
            raise ValueError(
                f"{where}: {moved} belongs in the DeepSpeed file (ds_config.json) or in --set ds.{moved}=…"
            )
        close = [n for n in known if n.endswith(f".{key}")]
        close += [n for n in known if n == _ONLY_IN_RECIPES.get(key)]
        close += difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        raise ValueError(
            f"{where}: unknown key {name}" + (f"; did you mean {close[0]}?" if close else _hint(key, section, method))
        )
    keys = recipe_keys(section, method)
    if key not in keys:
        own = ", ".join(get_type_hints(METHODS[method].options))
        others = ", ".join(m for m, entry in METHODS.items() if key in get_type_hints(entry.options))
        raise ValueError(f"{where}: {name} is no key of method {method}, which has {own}; methods with it: {others}")
    return _convert(value, keys[key], name, where)


def _convert(value: Any, wanted: Any, name: str, where: str) -> Any:
    """A TOML or JSON value as the type of its field; a whole number serves where a fraction is allowed."""
    for kind in _alternatives(wanted):
        if get_origin(kind) is tuple:
            kinds = get_args(kind)
            open_end = kinds[-1] is Ellipsis
            if isinstance(value, list) and (open_end or len(value) == len(kinds)):
                kinds = (kinds[0],) * len(value) if open_end else kinds
                return tuple(_convert(v, kind, name, where) for v, kind in zip(value, kinds, strict=True))
        elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, kind) and (kind is not int or not isinstance(value, bool)):
            return value
    raise ValueError(f"{where}: {name} = {json.dumps(value, default=str)}; allowed is {_describe(wanted)}")


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return get_args(wanted) if get_origin(wanted) is UnionType else (wanted,)


def _describe(wanted: Any) -> str:
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
    said = []
    for kind in _alternatives(wanted):
        kinds = get_args(kind)
        if get_origin(kind) is not tuple:
            said.append(words[kind])
        elif kinds[-1] is Ellipsis:
            said.append(f"a list, each {words[kinds[0]]}")
        else:
            said.append(f"[{', '.join(words[k] for k in kinds)}]")
    return ", or ".join(said)


def _check_deepspeed(given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The DeepSpeed document with our defaults, every key known and of its type."""
    document = json.loads(json.dumps(DEEPSPEED_DEFAULTS))
    for key, value in given.items():
        fields_of = DEEPSPEED_KEYS.get(key)
        if fields_of is None:
            raise ValueError(f"{path}: " + _unknown_deepspeed_key(key))
        if not isinstance(fields_of, dict):
            document[key] = _convert(value, fields_of, key, path)
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {key} = {json.dumps(value)}; allowed is a section with {', '.join(fields_of)}")
        section = document.setdefault(key, {})
        for name, entry in value.items():
            if name not in fields_of:
                close = difflib.get_close_matches(name, fields_of, n=1)
                hint = f"did you mean {key}.{close[0]}?" if close else f"allowed are {', '.join(fields_of)}"
                raise ValueError(f"{path}: unknown key {key}.{name}; {hint}")
            section[name] = _convert(entry, fields_of[name], f"{key}.{name}", path)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if key not in document:
            raise ValueError(f"{path}: {key} is missing; it is a number of clips")
        allow(f"{path}: {key}", document[key], document[key] >= 1, "1 or more")
    allow(
        f"{path}: gradient_clipping",
        document["gradient_clipping"],
        0 <= document["gradient_clipping"] < inf,
        "0 (off) or more",
    )
    _check_precision(document, path)
    return document


def _check_precision(document: dict[str, Any], path: str) -> None:
    """bf16 comes by torch_autocast alone, and weights are not sharded."""
    for section in ("bf16", "fp16"):
        if document.pop(section, {}).get("enabled", False):
            raise ValueError(
                f"{path}: {section} is enabled; use torch_autocast with dtype bfloat16 instead: its own section "
                "rounds the master weights and takes a stray optimizer step before training"
            )
    dtype, stage = document["torch_autocast"].get("dtype"), document["zero_optimization"].get("stage")
    allow(f"{path}: torch_autocast.dtype", dtype, dtype == "bfloat16", '"bfloat16" (float32: enabled = false)')
    only = "0: what trains here fits one device, and sharding it would bind a run to its number of processes"
    allow(f"{path}: zero_optimization.stage", stage, stage == 0, only)


def _unknown_deepspeed_key(key: str) -> str:
    if key in _ONLY_IN_RECIPES or key in SECTIONS:
        return f"{key} belongs in the recipe, as {_ONLY_IN_RECIPES.get(key, f'section [{key}]')}"
    homes = [f"{section}.{key}" for section in SECTIONS if key in recipe_keys(section)]
    if homes:
        return f"{key} belongs in the recipe, as {homes[0]}"
    if key == "gradient_accumulation_steps":
        return "gradient_accumulation_steps follows from the two batch sizes and the number of processes; leave it out"
    close = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1)
    return f"unknown key {key}; " + (
        f"did you mean {close[0]}?" if close else f"allowed are {', '.join(DEEPSPEED_KEYS)}"
    )


def _hint(key: str, section: str = "", method: str = _DEFAULT_METHOD) -> str:
    """The home of a key that resembles one of DeepSpeed's, or the keys of its section, or the sections there are."""
    close = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1)
    if close and section != "model":
        return f"; the DeepSpeed file (ds_config.json) has {close[0]}, here --set ds.{close[0]}=…"
    if section in SECTIONS:
        owner = f"method {method}" if section == "model" else f"[{section}]"
        return f"; {owner} has {', '.join(recipe_keys(section, method))}"
    return f"; sections are {', '.join(SECTIONS)}"


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_read_text(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; allowed are {MAX_BYTES}")
    return path.read_text(encoding="utf-8")


def _flatten(document: Mapping[str, Any], path: str) -> Iterable[tuple[str, str, Any]]:
    """(section, key, value) of a recipe."""
    for section, entries in document.items():
        if isinstance(entries, dict):
            yield from ((section, key, value) for key, value in entries.items())
            continue
        if section in DEEPSPEED_KEYS:
            raise ValueError(
                f"{path}: {section} belongs in the DeepSpeed file (ds_config.json) or in --set ds.{section}=…"
            )
        homes = [f"[{name}]" for name in SECTIONS if section in recipe_keys(name)]
        raise ValueError(
            f"{path}: {section} stands outside a section" + (f"; its is {homes[0]}" if homes else _hint(section))
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no such DeepSpeed file: {path}")
    try:
        document = json.loads(_read_text(path), object_pairs_hook=_no_duplicates(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a JSON object")
    return document


def _no_duplicates(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ValueError(f"{path}: {twice[0]} stands there twice")
        return dict(pairs)

    return build


def parse_override(override: str) -> tuple[list[str], Any]:
    """`a.b=c` → (["a", "b"], c)."""
    name, equals, text = override.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        homes = [f"{section}.{keys[0]}" for section in SECTIONS if keys[0] in recipe_keys(section)]
        homes += [f"ds.{keys[0]}"] if keys[0] in DEEPSPEED_KEYS else []
        if equals and len(keys) == 1 and homes:
            also = f"did you mean --set {' or '.join(f'{home}={text}' for home in homes)}?"
        else:
            also = "such as optimizer.lr=1e-4"
        raise ValueError(f"--set {override}: the form is section.key=value, {also}")
    return keys, parse_value(text, override)


def parse_value(text: str, override: str) -> Any:
    """The value of an `override` in TOML's syntax; a bare word is text."""
    if not text.strip():  # key="" after a shell has taken the quotes
        return ""
    try:
        return tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text.strip()[0] in "[{\"'" or "\n" in text:
            raise ValueError(f"--set {override}: the value is not valid TOML ({error})") from error
        return text.strip()


def _put(document: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    """Sets document[k0][k1]… = value."""
    for key in keys[:-1]:
        document = document.setdefault(key, {})
        if not isinstance(document, dict):
            raise ValueError(f"{where}: {key} is not a section")
    document[keys[-1]] = value
