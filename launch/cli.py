"""The command line: `brumby COMMAND [key=value ...]`, composed by Hydra from `brumby.configs`."""

import importlib.resources
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts and lists, interpolations resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def convert(config: DictConfig) -> int:
    """Turn an attention checkpoint into a power-retention checkpoint."""
    from brumby.convert import convert

    options = plain(config)
    convert(options.pop("source"), options.pop("out"), **options)
    return 0


def prepare(config: DictConfig) -> int:
    """Tokenise a run's text into shards, or say what that takes; then 1 if a source cannot be read."""
    from rich.console import Console

    import brumby.model  # noqa: F401  (transformers looks the model up to find its tokenizer)
    from brumby.data import DataConfig, prepare
    from brumby.data.plan import plan

    data, num_workers = DataConfig.from_dict(plain(config.data)), config.num_workers or os.cpu_count() or 1
    if config.dry_run:
        return int(not plan(data, num_workers, Console()))
    prepare(data, num_workers)
    return 0


def data_inspect(config: DictConfig) -> int:
    """Show what a run will see or saw: tokens by source and phase, the text of a step."""
    from rich.console import Console

    import brumby.model  # noqa: F401
    from brumby.data import Batches, DataConfig
    from brumby.data.inspect import show_documents, show_mixture, write_documents
    from brumby.train.config import load
    from brumby.train.tracking import read_metrics

    console, run_dir = Console(), Path(config.run) if config.run else None
    data = load(run_dir).data if run_dir else DataConfig.from_dict(plain(config.data))
    batches = Batches(data)
    if config.step is not None:
        if not 1 <= config.step <= batches.num_steps:
            raise ValueError(f"step is {config.step}; the run has steps 1 to {batches.num_steps}")
        if config.out is not None:
            write_documents(data, batches, config.step - 1, Path(config.out))
        else:
            show_documents(data, batches, config.step - 1, config.samples, console)
        return 0
    rows = read_metrics(run_dir / "metrics.jsonl") if run_dir else []
    show_mixture(data, batches, console, rows[-1]["step"] if rows else None)
    for row in rows:
        if "not_applied" in row:
            console.print(f"step {row['step']} was not applied: {row['not_applied']}", highlight=False)
    return 0


def train(config: DictConfig) -> int:
    """Retrain in this process, or resume a run in it."""
    from brumby.launch.runs import create_or_resume
    from brumby.train.__main__ import run

    return run(create_or_resume(config, num_ranks=1))


def launch(config: DictConfig) -> int:
    """Retrain on several ranks, here or on the hosts of a hostfile."""
    from brumby.launch.cluster import LaunchConfig, launch, preflight
    from brumby.launch.doctor import require
    from brumby.launch.examine import examine
    from brumby.launch.runs import await_run, create_or_resume
    from brumby.train.config import load

    names = ["hosts", "num_hosts", "launcher", "ranks_per_host", "master_port", "env"]
    names += ["restarts", "min_hosts", "grace"]
    cluster = LaunchConfig(**plain(OmegaConf.create({name: config.pop(name) for name in names})))
    preflight(cluster)
    if cluster.launcher != "torchrun":
        resumed = load(Path(config.resume)) if config.resume else None
        model, root = (resumed.model, resumed.data.root) if resumed else (config.model, config.data.root)
        require(examine(cluster, [str(model), str(root)]))
    run_dir = await_run(config) if cluster.node_rank else create_or_resume(config, cluster.num_ranks)
    return launch(cluster, run_dir)


def doctor(config: DictConfig) -> int:
    """Say what this machine or a cluster can run and what is missing; 1 if anything is."""
    from brumby.launch.cluster import LaunchConfig
    from brumby.launch.doctor import all_reduce, show
    from brumby.launch.examine import examine

    options = plain(config)
    paths, runs_dir = options.pop("paths"), options.pop("runs_dir")
    cluster = LaunchConfig(**options)
    findings = examine(cluster, paths)
    if not any(finding.subject == "answer" for finding in findings):
        findings += all_reduce(cluster, Path(runs_dir))
    show(findings)
    return int(any(finding.advice for finding in findings))


def export(config: DictConfig) -> int:
    """Write a run's checkpoint as a Hugging Face model."""
    from brumby.convert.export import export
    from brumby.launch.runs import find_checkpoint
    from brumby.train.config import load

    run_dir = Path(config.run)
    start = Path(load(run_dir).model)
    export(find_checkpoint(run_dir, config.step), start, Path(config.out), config.dtype)
    return 0


def generate(config: DictConfig) -> int:
    """Stream text from a converted or exported model."""
    from brumby.launch.generate import generate

    options = plain(config)
    generate(options.pop("model"), options.pop("prompt"), **options)
    return 0


def tune(config: DictConfig) -> int:
    """Find the fastest tiles of the Triton kernels on this GPU and write their table."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; tiles are chosen by their time on one")
    from brumby.kernels.tune import tune

    print(tune(torch.device("cuda", torch.cuda.current_device()), Path(config.out) if config.out else None))
    return 0


COMMANDS: dict[str, Callable[[DictConfig], int]] = {
    command.__name__.replace("_", " "): command
    for command in (convert, prepare, train, launch, export, generate, data_inspect, doctor, tune)
}


@dataclass
class Arguments:
    command: str
    overrides: list[str]
    config_dir: str | None = None
    show_config: bool = False
    show_help: bool = False


def parse(argv: list[str]) -> Arguments:
    """Split `argv` into a command, Hydra overrides and options.

    Raises:
        ValueError: an unknown command or option.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        return Arguments("", [], show_help=True)
    command, rest = argv[0], argv[1:]
    if command == "data" and rest:
        command, rest = f"data {rest[0]}", rest[1:]
    if command not in COMMANDS:
        raise ValueError(f"there is no command {command!r}; the commands are {', '.join(COMMANDS)}")
    arguments = Arguments(command, [])
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            arguments.show_help = True
        elif word == "--cfg" and rest and rest[0] == "job":
            rest.pop(0)
            arguments.show_config = True
        elif word == "--config-dir" and rest:
            arguments.config_dir = rest.pop(0)
        elif word.startswith("-") or "=" not in word:
            raise ValueError(f"cannot read {word!r}; expected key=value, --cfg job, --config-dir DIR or --help")
        else:
            arguments.overrides.append(word)
    return arguments


def compose(command: str, overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """The command's configuration with overrides.

    Raises:
        ValueError: Hydra cannot compose it.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException

    if config_dir is not None:
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    try:
        with initialize_config_module("brumby.configs", version_base="1.3"):
            config = compose(command.replace(" ", "_"), overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(str(error).strip()) from error
    OmegaConf.set_struct(config, False)  # what is checked is the typed form
    return config


def help_text(command: str) -> str:
    if not command:
        lines = [f"  {name:<14}{(function.__doc__ or '').strip()}" for name, function in COMMANDS.items()]
        return (
            "usage: brumby COMMAND [key=value ...]\n\n"
            + "\n".join(lines)
            + "\n\nbrumby COMMAND --help tells more."
        )
    configs = importlib.resources.files("brumby.configs")
    text = configs.joinpath(f"{command.replace(' ', '_')}.yaml").read_text()
    if "- train\n" in text:
        text += "\n" + configs.joinpath("train.yaml").read_text()
    experiments = sorted(file.name.removesuffix(".yaml") for file in configs.joinpath("experiment").iterdir())
    return (
        f"usage: brumby {command} [key=value ...] [--cfg job] [--config-dir DIR]\n\n"
        f"{(COMMANDS[command].__doc__ or '').strip()}\n\n"
        "  key=value         set a field below (Hydra's override grammar)\n"
        "  --cfg job         show the composed configuration and stop\n"
        "  --config-dir DIR  look for experiments and data blends of your own in DIR too\n\n"
        f"{text}\nexperiments: {', '.join(experiments)}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 2 bad input (nothing was changed), 130 interrupted."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        if arguments.show_help:
            print(help_text(arguments.command))
            return 0
        config = compose(arguments.command, arguments.overrides, arguments.config_dir)
        if arguments.show_config:
            print(OmegaConf.to_yaml(config), end="")
            return 0
        missing = OmegaConf.missing_keys(config) if "data" not in config else set()
        if missing:
            raise ValueError(f"brumby {arguments.command} needs {', '.join(f'{m}=...' for m in sorted(missing))}")
        return COMMANDS[arguments.command](config)
    except (ValueError, FileNotFoundError, FileExistsError, OmegaConfBaseException) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
