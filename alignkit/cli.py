"""The command line: ``alignkit train|evaluate|report|compare|…``; ``USAGE`` lists the verbs."""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NoReturn

from alignkit.errors import Stopped, UserError, suggest

USAGE = """alignkit: alignment experiments from one configuration

  alignkit train +algo=NAME [key=value …]      train by a method; repeat the command to resume
  alignkit train +preset=NAME [key=value …]    run a preset
  alignkit train -m +algo=a,b seed=1,2         sweep, one directory a run
  alignkit train … --dry-run                   what it would do and need: rows, parameters, memory, disk, an example
  alignkit evaluate RUN_OR_MODEL [data=NAME]   decode and score held-out rows
  alignkit report RUN_OR_FOLDER …              runs as one HTML page, and as tables here
  alignkit compare A B                         settings, results and costs of two runs, with paired differences
  alignkit diff RUN RUN                        settings, data, packages and commands that two runs do not share
  alignkit table --latex RUN_OR_FOLDER …       results as LaTeX, Markdown (--markdown) or CSV (--csv)
  alignkit claim NAME [--quick] [key=value …]  measure again what a paper claims: PASS, FAIL or INCONCLUSIVE
  alignkit verify-resume +algo=NAME [words …]  kill a short run, go on with it, compare it bit for bit with an unbroken one
  alignkit list                                methods by stage, presets, models, data, rewards
  alignkit show NAME                           a method's card: idea, settings, example
  alignkit show settings                       what every run takes: model.*, evaluate.*, run.*
  alignkit explain KEY [+algo=NAME] [key=value …]  a setting's value, who set it, over what, and what reads it
  alignkit from-trl CONFIG.yaml                a configuration of TRL's command line as words of `alignkit train`
  alignkit completion bash|zsh|fish            a script that lets the shell complete all of this
  alignkit doctor                              versions, devices, caches, and what is wrong

`alignkit train +algo=NAME --cfg job` prints the composed configuration; `--help` prints Hydra's flags."""

RECORD = (".hydra", ".lock", "command.txt", "config.yaml", "environment.json", "data.json", "wandb")
FIRST_TELLS = (
    5.0  # seconds that the first of several processes has to tell of a mistake: the end of one is the end of all
)
CONFIG_DIR = ("--config-dir", "-cd")
VERBS = (
    "train", "evaluate", "claim", "verify-resume", "report", "compare", "diff", "table", "list", "show", "explain", "from-trl",
    "completion", "doctor",
)  # fmt: skip
LAUNCHERS = ("basic", "joblib", "submitit_local", "submitit_slurm")
MODULES = {"verify-resume": "verify", "from-trl": "from_trl"}  # where a verb's is not called like it


def main(argv: list[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (a fault of ours), 2 (a user's mistake) or 130 (stopped)."""
    words = sys.argv[1:] if argv is None else argv
    if os.environ.get("WORLD_SIZE", "1") == "1":
        _answer(words)
    else:
        from alignkit import processes

        with processes.ending():
            _answer(words)


def _answer(words: list[str]) -> None:
    """Do what is asked; a mistake and a stop are told in one line."""
    try:
        _dispatch(words)
    except UserError as e:
        _refuse(e)
    except Stopped as e:
        _leave(f"\n{e}", 130)
    except KeyboardInterrupt:
        _leave("\nstopped.", 130)
    except BrokenPipeError:
        sys.stderr.close()


def _dispatch(words: list[str]) -> None:
    verb, rest = (words[0], words[1:]) if words else ("", [])
    if verb in ("", "-h", "--help", "help"):
        print(USAGE)
    elif verb == "--version":
        from alignkit import __version__

        print(__version__)
    elif verb == "train":
        train(rest)
    elif verb == "evaluate":
        train(evaluate_words(rest))
    elif verb in ("report", "compare", "diff", "table"):
        from alignkit.report import command

        getattr(command, verb)(rest)
    elif verb == "list":
        from alignkit.catalog import listing

        print(listing(use_config_dirs(rest)))
    elif verb == "show":
        from alignkit.catalog import card

        extra, names = use_config_dirs(rest), [w for w in without_config_dirs(rest) if not w.startswith("-")]
        if len(names) != 1:
            raise UserError("show: name one method, preset, model, data set or reward, as in `alignkit show esrl`.")
        print(card(names[0], extra))
    elif verb == "doctor":
        from alignkit.catalog import doctor

        report, wrong = doctor()
        print(report)
        print("\nwhat is wrong:\n" + "\n".join(f"  - {line}" for line in wrong) if wrong else "\nnothing is wrong.")
        sys.exit(1 if wrong else 0)
    elif verb in VERBS:  # a module of its own, whose ``main`` takes the words and gives the exit code
        code = importlib.import_module(f"alignkit.{MODULES.get(verb, verb)}").main(rest)
        if code:
            sys.exit(code)
    else:
        raise UserError(f"'{verb}' is not a command.{suggest(verb, VERBS)}")


def train(words: list[str]) -> None:
    """Hand the words to Hydra, which composes the configuration and calls ``launch`` once a job."""
    if {"-m", "--multirun"} & {*words} and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "a sweep runs in one process, which starts the jobs. Start it without torchrun or accelerate; run.processes=N starts N "
            "processes of this machine for each job."
        )
    dry, words = "--dry-run" in words, [w for w in words if w != "--dry-run"]
    words = hydra_words(words)
    flags = {w.partition("=")[0] for w in words if w.startswith("-")}
    if not any(w.startswith(("+algo=", "+preset=")) for w in words) and not flags & {
        "--help",
        "-h",
        "--hydra-help",
        "--info",
        "-i",
        "--cfg",
        "-c",
    }:
        from alignkit.catalog import listing

        print(listing(use_config_dirs(words)))
        raise UserError("train: name a method with +algo=NAME or a preset with +preset=NAME.")

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from alignkit import sweep
    from alignkit.config import conf_dir, register

    register()
    if dry:
        from alignkit.dry_run import dry_words

        words = dry_words(words)
    if "hydra/sweeper=optuna" in words and not any(w.startswith("hydra.sweeper.direction=") for w in words):
        words.append("hydra.sweeper.direction=maximize")  # as every metric that picks a checkpoint is
    sys.argv = ["alignkit train", *words]
    use_config_dirs(words)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on, instead of printing them and exiting with 1
    started = False

    def job(cfg: object) -> float | None:
        nonlocal started
        started = True
        single, launcher = HydraConfig.get().mode == RunMode.RUN, HydraConfig.get().runtime.choices["hydra/launcher"]
        if single and launcher != "basic":
            _refuse(
                UserError(
                    f"hydra/launcher={launcher} launches the jobs of a sweep; without -m this run would go on right here. Add -m: "
                    f"alignkit train -m …"
                )
            )
        if dry:
            _dry(cfg)
            return None
        return _alone(cfg) if single else _job(cfg)

    with sweep.reported() if not dry else nullcontext():
        try:
            hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()
        except (HydraException, OmegaConfBaseException) as e:
            if started:
                raise
            raise UserError(uncomposed(e, words)) from None


def uncomposed(e: Exception, words: list[str]) -> str:
    """Why Hydra could not compose these words, and the way out."""
    from omegaconf.errors import ValidationError

    from alignkit.config import type_of

    if "Ambiguous value" in str(e):
        return f"{str(e).splitlines()[0]} Several values are a sweep: alignkit train -m …"
    part = re.search(r"Could not override '(\w+)@algo\.", str(e))
    if part:
        return f"{part[1]}=…: this method takes no {part[1]}. `alignkit show NAME` prints its settings."
    launcher = re.search(r"Could not find 'hydra/launcher/([\w-]+)'", str(e))
    if launcher:
        return f"hydra/launcher={launcher[1]}: there is no such launcher.{suggest(launcher[1], LAUNCHERS)}"
    typed = next((x for x in (e, e.__cause__, e.__context__) if isinstance(x, ValidationError) and x.full_key), None)
    wanted = None if typed is None else type_of(str(typed.full_key))
    if typed is not None and wanted is not None:
        where = f" ({str(e).split(':')[0]})" if str(e).startswith("In '") else ""  # a file's, not a word's
        value = "null" if typed.value is None else repr(typed.value)
        return f"{typed.full_key}: must be {wanted}, is {value}{where}."
    if "hydra.launcher." in " ".join(words) and not {"-m", "--multirun"} & {*words}:
        return (
            f"{str(e).splitlines()[0]} hydra.launcher.* are of the launcher of a sweep: add -m and hydra/launcher=NAME."
        )
    step = next((w.partition("=")[0] for w in words if w.lstrip("+").startswith("more.")), None)
    hint = f" Words of a step want quotes inside: '{step}=\"algo.steps=5\"'." if step else ""
    hint += " Quote a value with braces twice: 'data.prompt=\"{column}\"'." if any("{" in w for w in words) else ""
    return " ".join(str(x).split("\n")[0] for x in (e, e.__cause__) if x) + hint


def _dry(cfg: object) -> None:
    """One job of a dry run; the first mistake ends it, as it would end that job."""
    from omegaconf import DictConfig

    from alignkit.dry_run import dry_run

    assert isinstance(cfg, DictConfig)
    try:
        dry_run(cfg)
    except UserError as e:
        _refuse(e)


def _alone(cfg: object) -> float | None:
    """The job of a single run: a mistake or a stop leaves the process with one message."""
    from alignkit import processes

    try:
        return _job(cfg)
    except UserError as e:
        _refuse(e)
    except Stopped as e:
        if not processes.first():  # all stop together, and the first one says it
            sys.exit(130)
        _leave(f"\n{e}", 130)
    except RuntimeError as e:
        if not processes.several() or not processes.left(e):
            raise
        time.sleep(FIRST_TELLS)  # torchrun ends all with the first one that ends, and names it
        _leave(
            f"error: another process is gone ({(str(e).splitlines() or [type(e).__name__])[0]}); see what that one says.",
            processes.LEFT,
        )
    return None


def _job(cfg: object) -> float | None:
    """One Hydra job; sweepers get the selected metric.

    Raises:
        UserError: a user's mistake.
        Stopped: by Ctrl-C or SIGTERM; says how to go on.
    """
    from omegaconf import DictConfig

    from alignkit.launch import launch, objective
    from alignkit.processes import how_to_go_on

    assert isinstance(cfg, DictConfig)
    try:
        result = launch(cfg)
        if cfg.data.get("show"):  # nothing was run
            _remove_if_empty(Path(cfg.run.dir))
        return objective(result, cfg)
    except UserError:
        _remove_if_empty(Path(cfg.run.dir))
        raise
    except Stopped as e:
        _remove_if_empty(Path(cfg.run.dir))
        raise Stopped(f"{e} {how_to_go_on(cfg)}") from None
    except KeyboardInterrupt:
        _remove_if_empty(Path(cfg.run.dir))
        raise Stopped(f"stopped at once. {how_to_go_on(cfg)}") from None
    except SystemExit as e:  # of a reward or a library; Hydra, too, would let it end the process
        raise RuntimeError(f"the run left the process with exit code {e.code}") from e


def hydra_words(words: list[str]) -> list[str]:
    """``algo=x`` and ``preset=x`` with the plus that Hydra wants; unknown keys and options refused with a suggestion.

    Raises:
        UserError: a key that the schema does not have, a group option that does not exist.
    """
    from alignkit.catalog import options
    from alignkit.config import GROUPS, PARTS, schema_keys

    words = [f"+{w}" if w.startswith("preset=") else w for w in words]
    if any(w.startswith("+preset=") for w in words):
        words = [w.removeprefix("+") if w.startswith("+algo=") else w for w in words]  # a preset has chosen one
    else:
        words = [f"+{w}" if w.startswith("algo=") else w for w in words]
    words = [
        re.sub(r"^\+(model|data|reward|engine)=", r"\1=", w) for w in words
    ]  # these groups have a choice to override
    words = [re.sub(rf"^({'|'.join(PARTS)})=(?=\w)", r"\1@algo.\1=", w) for w in words]
    multirun = [w for w in words if w in ("-m", "--multirun")]  # Hydra's parser wants its flags first
    words = multirun + [w for w in words if w not in multirun]
    words = [re.sub(r"^(model|data|reward|engine)=null$", r"~\1", w) for w in words]
    extra = use_config_dirs(words)
    for word in words:
        matched = re.match(r"^[+~]*([\w./@-]+)=(.*)$", word)
        if not matched or word.startswith("-"):
            continue
        key, value = matched.groups()
        group = key.partition("@")[0]  # reward@audit.reward=chrf: an option of one group, put elsewhere
        if group in GROUPS and re.fullmatch(r"[\w,/.-]+", value):
            known = options(group, extra)
            for option in value.split(","):
                if option not in known:
                    raise UserError(f"{key}={option}: there is no such {group}.{suggest(option, known)}")
            continue
        if key.startswith("hydra") or "/" in key or group in GROUPS:
            continue
        parts = key.split(".")
        for depth, part in enumerate(parts):
            above = ".".join(parts[:depth])
            here = schema_keys(above)
            if here is not None and part not in here:
                where = f"{above}." if above else ""
                raise UserError(f"{where}{part}: no such key.{suggest(part, here)}")
    return words


def without_config_dirs(words: list[str]) -> list[str]:
    """The words that are neither ``--config-dir`` nor what it names."""
    flags = tuple(f"{flag}=" for flag in CONFIG_DIR)
    return [
        w for i, w in enumerate(words)
        if w not in CONFIG_DIR and not w.startswith(flags) and (not i or words[i - 1] not in CONFIG_DIR)
    ]  # fmt: skip


def use_config_dirs(words: list[str]) -> list[Path]:
    """The folders of ``--config-dir``; classes beside their files, and in the working folder, can be named from now on.

    Raises:
        UserError: no such folder.
    """
    found = [words[i + 1] for i, w in enumerate(words[:-1]) if w in CONFIG_DIR]
    found += [w.partition("=")[2] for w in words if w.startswith(tuple(f"{flag}=" for flag in CONFIG_DIR))]
    for folder in found:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder}: no such folder.")
    sys.path += [p for p in map(os.path.abspath, (os.getcwd(), *found)) if p not in sys.path]
    return [Path(folder) for folder in found]


def evaluate_words(words: list[str]) -> list[str]:
    """``RUN_OR_MODEL [overrides]`` as the words of the evaluate stage; a run brings its own data.

    Raises:
        UserError: no model named, or a path that is not there.
    """
    if not words or "=" in words[0] or words[0].startswith("-"):
        raise UserError("evaluate: name a run directory, a model folder, a hub id or bundled:NAME first.")
    model, rest = words[0], words[1:]
    given = [] if any(w.startswith("data=") for w in rest) else _data_of(Path(model))
    if not given and not any(w.startswith(("data=", "data.")) for w in rest):
        if model.count("/") and not Path(model).exists() and Path(model).parent.is_dir():
            raise UserError(
                f"evaluate: {model}: no such run or folder.{suggest(model, map(str, Path(model).parent.iterdir()))}"
            )
        raise UserError(f"evaluate: {model} is not a run, so name the data: data=NAME (see `alignkit list`).")
    if any(w in ("data=pairs", "data=custom") for w in rest) and not any(w.startswith("data.train=") for w in rest):
        given = [*given, "data.train=null"]
    plain = re.fullmatch(r"[\w./:@-]+", model)
    quoted = model if plain else "'" + model.replace("'", r"\'") + "'"
    stage = _evaluation_of(Path(model))
    return [f"+algo={stage}", f"model.path={quoted}", *given, *rest]


def _evaluation_of(folder: Path) -> str:
    """The stage that measures what a run or model folder holds: a policy, a reward model (of alignkit, or a classifier of
    transformers with one label), or a classifier."""
    import json

    inside = [
        p for p in (folder / "final", folder, *sorted(folder.glob("checkpoint-*"))) if (p / "config.json").is_file()
    ]
    if not inside:
        return "evaluate"
    config = json.loads((inside[0] / "config.json").read_text(encoding="utf-8"))
    classifies = any(k.endswith("ForSequenceClassification") for k in config.get("architectures") or [])
    if (inside[0] / "reward_model.json").is_file() or (classifies and len(config.get("id2label", "12")) == 1):
        return "evaluate_rm"
    return "evaluate_classes" if classifies else "evaluate"


def _data_of(run: Path) -> list[str]:
    """The words that chose the data of a run: its group option and its data.* overrides."""
    import yaml

    if not (run / ".hydra" / "hydra.yaml").exists():
        return []
    hydra = yaml.safe_load((run / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))["hydra"]
    choice = hydra["runtime"]["choices"].get("data")
    words = [w for w in hydra["overrides"]["task"] if w.lstrip("+").startswith("data.")]
    return ([f"data={choice}"] if choice else []) + words


def _remove_if_empty(directory: Path) -> None:
    """Take back a directory in which a start has left its record, but no step and no result; not one in which another process
    works, which may just have begun."""
    import shutil

    from alignkit.launch import locked

    if directory.is_dir():
        with suppress(UserError), locked(directory):
            if all(p.name in RECORD for p in directory.iterdir()):
                shutil.rmtree(directory, ignore_errors=True)


def _refuse(e: UserError) -> NoReturn:
    """Leave with a mistake. One that each of several processes finds by itself, the first tells; its end is theirs."""
    from alignkit import processes

    if not processes.first():
        time.sleep(FIRST_TELLS)
        if not processes.met:
            sys.exit(2)
    _leave(f"error: {e}", 2)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
