"""Runs an experiment: `python experiments/run.py NAME [flags]`; without a name, `summarize`.

An experiment is a file of this folder that offers `DESCRIPTION` (one line), `Config` (a frozen dataclass
whose defaults are the preset; importable without jax) and `run(config, folder) -> dict[str, float]`. Preset
< `--config file.yaml` < flags.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs as it lies, from any folder

from experiments.options import (
    did_you_mean,
    differences,
    flatten,
    override,
    read_yaml,
    to_mapping,
    write_yaml,
)
from rlhfjax import __version__, console, processes, run_folder, tracking
from rlhfjax.config import Mesh

HERE = Path(__file__).resolve().parent
DEFAULT_EXPERIMENT = "summarize"
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class RunOptions:
    """How to run; the experiment's own options follow."""

    seed: int = 0
    """Root of all randomness of the run."""
    max_steps: int | None = None
    """At most so many steps in every stage: a quick look whether all works, not a result."""
    config: Path | None = None
    """YAML file of options; flags win over it. --print-config writes one."""
    run_dir: Path | None = None
    """Folder of this run. None: runs/NAME/TIME-sSEED."""
    resume: Path | None = None
    """Folder of an earlier run, to continue it with its own options."""
    profile: int = 0
    """Steps of each stage to trace, after two that may compile; the traces go to profile/STAGE of the run."""
    log: str = "jsonl"
    """Where metrics go, comma-separated: jsonl (always), tensorboard, wandb, trackio. WANDB_MODE=offline works."""
    mesh: Mesh = Mesh()
    """How the devices are laid out. A run may be resumed on others."""
    distributed: str = "auto"
    """Several processes as one run. auto: where Slurm, Open MPI, Kubernetes or Cloud TPU have started several; on; off;
    or HOST:PORT,COUNT,INDEX: address of process 0, number of processes, number of this one."""
    heartbeat_seconds: int = 60
    """With several processes: after so long without a sign of life from one the others end."""
    join_seconds: int = 300
    """With several processes: within so long all must have started."""
    dry_run: Flag = False
    """Say what the run would need, take and cost, and stop: on --devices of --accelerator, which need not be there."""
    accelerator: str = "here"
    """For --dry-run: here, cpu, h100, a100-80g, v5e and others, or a YAML file that describes one."""
    devices: int = 0
    """For --dry-run: how many; 0: what --mesh says, at least 1."""
    stages: tuple[str, ...] = ()
    """For --dry-run: these stages only, such as ppo; empty: all."""
    price: float | None = None
    """For --dry-run: of a device, an hour."""
    list: Flag = False
    """List the experiments and stop."""
    print_config: Flag = False
    """Print all options as YAML, to edit and give back with --config, and stop."""


RECORDED = ("seed", "max_steps")  # the runner's options that are part of what a run is


def main(arguments: Sequence[str] | None = None, directory: Path = HERE) -> int:
    """Runs the command line `arguments` on the experiments in `directory`; returns the exit status.

    0: done; 1: the run failed; 2: it was not begun; 130 and 143: stopped by Ctrl-C and by SIGTERM, to be resumed. Of
    several processes, one that fails ends here.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if "--list" in arguments:
            print(list_experiments(directory))
            return 0
        if not {"--help", "-h", "--print-config", "--dry-run"} & {*arguments}:
            start_processes(arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        if not processes.is_first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            status = prepare_and_execute(arguments, directory, stack)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            print(f"{_error()}: {error}", file=sys.stderr)
            status = 2
        except SystemExit as error:  # tyro's, which has said why
            if processes.count() == 1:
                raise
            status = error.code if isinstance(error.code, int) else 2
        except Exception:
            if processes.count() == 1:
                raise
            traceback.print_exc()
            status = 1
    return processes.leave(status)


def start_processes(arguments: list[str]) -> None:
    """Joins the other processes of this run, where there are some: before anything that one alone may find wrong."""
    try:
        first, _ = _early_parser().parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    processes.start(
        first.distributed, heartbeat_seconds=first.heartbeat_seconds, join_seconds=first.join_seconds
    )


def prepare_and_execute(arguments: list[str], directory: Path, stack: contextlib.ExitStack) -> int:
    """Reads the command line, opens the run's folder and runs in it. `stack` holds what must be given back."""
    name, module, options, config = processes.together("command line", lambda: parse(arguments, directory))
    record = _record(name, options, config)
    if options.print_config:
        print(write_yaml(record), end="")
        return 0
    if options.dry_run:
        print(plan(name, module, config, options), end="")
        return 0
    tracking.parse_names(options.log)
    if options.profile < 0:
        raise ValueError(f"--profile {options.profile} must be at least 0 steps")
    processes.agree("the configuration", _what_all_share(options, record))

    from rlhfjax.mesh import make_mesh

    # Says what is wrong with it while there is no folder yet.
    processes.together("mesh", lambda: make_mesh(options.mesh))

    def enter() -> str:
        path = open_folder(name, options, record).path
        stack.enter_context(run_folder.lock(path))
        return str(path if processes.count() == 1 else path.absolute())

    path = Path(processes.from_first("folder of the run", enter))
    processes.all_see(path)
    folder = run_folder.RunFolder(
        path, name, options.seed, options.max_steps, profile=options.profile, mesh=options.mesh
    )
    return execute(module, config, folder, options, record)


def plan(name: str, module: ModuleType, config: Any, options: RunOptions) -> str:
    """What `--dry-run` prints. Raises ValueError where the experiment has no plan, or none for so many devices."""
    from experiments import planning

    if not hasattr(module, "plan"):
        raise ValueError(
            f"{name} has no `plan(config, mesh)`, from which --dry-run could tell what it compiles"
        )
    return planning.dry_run(
        name,
        functools.partial(module.plan, config),
        options.mesh,
        accelerator=options.accelerator,
        devices=options.devices,
        price=options.price,
        stages=options.stages,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


def parse(arguments: list[str], directory: Path) -> tuple[str, ModuleType, RunOptions, Any]:
    """From a command line: the experiment's name and module, the runner's options, the experiment's config.

    Raises ValueError or FileNotFoundError on an unknown experiment, a bad YAML file, a folder that is no
    run, or options that differ from those of the run to resume. An unknown or mistyped flag ends the
    process as tyro does, status 2.
    """
    first, _ = _early_parser().parse_known_args(arguments)
    saved = _read_run(first.resume) if first.resume else {}
    layers = [(saved, str(first.resume))] if saved else []
    layers += [(read_yaml(first.config), str(first.config))] if first.config else []
    typed = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    name = _one_name(typed, layers)
    module = load_experiment(name, directory)
    options, config = RunOptions(), module.Config()
    for layer, source in layers:
        own = {key: value for key, value in layer.items() if key in RECORDED}
        rest = {key: value for key, value in layer.items() if key not in (*RECORDED, "experiment")}
        options, config = override(options, own, source=source), override(config, rest, source=source)
    options, config = _parse_flags(name, arguments, options, config, directory)
    if saved:
        changed = differences(saved, _record(name, options, config))
        if changed:
            lines = "\n  ".join(changed)
            raise ValueError(
                f"--resume continues {first.resume} as it was begun, and these options differ:\n  {lines}\n"
                "Leave them out to continue it, or leave out --resume to start a new run with them"
            )
    return name, module, options, config


def open_folder(name: str, options: RunOptions, record: dict[str, Any]) -> run_folder.RunFolder:
    """The folder to run in: a new one, or that of the run to resume."""
    if options.resume:
        if options.run_dir:
            raise ValueError(
                "--run-dir makes a new folder and --resume goes on in an old one: give one of them"
            )
        return run_folder.RunFolder(options.resume, name, options.seed, options.max_steps)
    return run_folder.create(
        options.run_dir or Path("runs"),
        write_yaml(record),
        experiment=name,
        seed=options.seed,
        max_steps=options.max_steps,
        exact=options.run_dir is not None,
    )


def execute(
    module: ModuleType, config: Any, folder: run_folder.RunFolder, options: RunOptions, record: dict[str, Any]
) -> int:
    """Runs the experiment in its folder, writes its summary, and says what to type next."""
    print(f"{folder.experiment}, seed {folder.seed}, in {folder.path}", flush=True)
    use_compilation_cache()

    def open_trackers() -> tracking.Tracker:
        if not processes.is_first():
            return tracking.silent()
        folder.repair()
        run_folder.write_environment(folder.path, HERE.parent, folder.mesh)
        return tracking.open_trackers(
            options.log, folder.path, record, f"{folder.experiment}/{folder.path.name}"
        )

    tracker = processes.together("trackers", open_trackers)
    try:
        with (
            processes.heed_sigterm(),
            contextlib.nullcontext(folder) if processes.is_first() else run_folder.own_copy(folder) as own,
        ):
            summary = module.run(config, dataclasses.replace(own, tracker=tracker))
            processes.together("summary", lambda: own.write_summary(summary))
    except KeyboardInterrupt:
        print(console.interrupted_lines(folder), file=sys.stderr)
        return 130
    except processes.Preempted as where:
        if processes.is_first():
            print(
                f"SIGTERM: {str(where) or 'between two stages'}{console.interrupted_lines(folder)}",
                file=sys.stderr,
            )
        return 143
    except (FloatingPointError, OSError, ValueError, processes.FailedElsewhere) as error:
        print(f"{_error()}: {error}\n{console.interrupted_lines(folder)}", file=sys.stderr)
        with contextlib.suppress(OSError):  # a full disk may be the error itself
            file = folder.path / ("error.txt" if processes.is_first() else f"error-{processes.index()}.txt")
            file.write_text(traceback.format_exc())
            print(f"The traceback is in {file}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        print(console.interrupted_lines(folder), file=sys.stderr)
        return 1
    finally:
        tracker.close()
    print(console.closing_lines(folder, summary), flush=True)
    return 0


def find_experiments(directory: Path) -> dict[str, str]:
    """Name -> description of the files in `directory` that set DESCRIPTION. Nothing is imported."""
    found = {}
    for path in sorted(directory.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [
                "DESCRIPTION"
            ]:
                found[path.stem] = ast.literal_eval(node.value)
    return found


def list_experiments(directory: Path) -> str:
    """One line per experiment: name and description."""
    found = find_experiments(directory)
    width = max(map(len, found), default=0)
    return "\n".join(f"{name:<{width}}  {description}" for name, description in found.items())


def load_experiment(name: str, directory: Path) -> ModuleType:
    """Imports the experiment `name`. Raises ValueError, with the nearest name, where there is none."""
    found = find_experiments(directory)
    if name not in found:
        raise ValueError(
            f"no experiment named {name!r}{did_you_mean(name, found)} (there are: {', '.join(found)})"
        )
    specification = importlib.util.spec_from_file_location(f"experiments.{name}", directory / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in ~/.cache/rlhfjax/xla or $RLHFJAX_CACHE_DIR (empty: no cache).

    Programs compiled for one processor may not run on another, and home folders are shared between
    machines: so there is a folder per processor type.
    """
    root = os.environ.get("RLHFJAX_CACHE_DIR", str(Path.home() / ".cache" / "rlhfjax" / "xla"))
    if not root:
        return
    import jax

    folder = Path(root) / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"note: compiled programs are not kept, since {folder} cannot be made ({error.strerror})")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _processor() -> str:
    """A short name for the instructions that this machine's processor has."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def _early_parser() -> argparse.ArgumentParser:
    """Reads the flags that decide what the others default to; tyro reads them again, for the help."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--distributed", default=RunOptions.distributed)
    for name in ("heartbeat_seconds", "join_seconds"):
        flags = (f"--{name.replace('_', '-')}", f"--{name}")
        parser.add_argument(*flags, dest=name, type=int, default=getattr(RunOptions, name))
    return parser


def _read_run(path: Path) -> dict[str, Any]:
    if not (path / "config.yaml").is_file():
        raise FileNotFoundError(f"--resume {path}: not a run folder (it has no config.yaml)")
    saved = read_yaml(path / "config.yaml")
    if "experiment" not in saved:
        raise ValueError(
            f"{path / 'config.yaml'} does not name its experiment: add a line `experiment: NAME`"
        )
    return saved


def _one_name(typed: str | None, layers: list[tuple[dict[str, Any], str]]) -> str:
    """The experiment that command line and files agree on."""
    name = typed
    for layer, source in layers:
        named = layer.get("experiment", name)
        if name not in (None, named):
            raise ValueError(f"{source} is for the experiment {named!r}, not {name!r}")
        name = None if named is None else str(named)
    return name or DEFAULT_EXPERIMENT


def _parse_flags(
    name: str, arguments: list[str], options: RunOptions, config: Any, directory: Path
) -> tuple[RunOptions, Any]:
    """Flags over `options` and `config`. tyro sees both as one, so that its suggestions cover both."""
    unprefixed = tyro.conf.arg(name="")
    fields: list[Any] = [
        ("options", Annotated[RunOptions, unprefixed]),
        ("config", Annotated[type(config), unprefixed]),
    ]
    command: Any = dataclasses.make_dataclass("Command", fields, frozen=True)
    found = find_experiments(directory)
    others = f"Experiments: {', '.join(found)}. --list says what each does, NAME --help what it takes."
    parsed = tyro.cli(
        command,
        prog=f"python experiments/run.py {name}",
        description=f"{found[name]}\n\n{others}",
        args=arguments,
        default=command(options, config),
    )
    return parsed.options, parsed.config


def _record(name: str, options: RunOptions, config: Any) -> dict[str, Any]:
    """What config.yaml holds."""
    return {"experiment": name} | {key: getattr(options, key) for key in RECORDED} | to_mapping(config)


def _what_all_share(options: RunOptions, record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same on all processes of a run, flat."""
    shared = {
        "resume": bool(options.resume),
        "mesh": dataclasses.asdict(options.mesh),
        "profile": options.profile,
    }
    versions = {"version of rlhfjax": __version__, "version of jax": metadata.version("jax")}
    return flatten(record | shared) | versions


def _error() -> str:
    """How a line that tells of an error begins."""
    return (
        "error" if processes.count() == 1 else f"error on process {processes.index()} of {processes.count()}"
    )


if __name__ == "__main__":
    sys.exit(main())
