"""The command line. Nothing heavy is imported before a command is known, so `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from regraft.engine import __version__
from regraft.engine.errors import LostProcessError, RegraftError
from regraft.engine.threads import give_way
from regraft.engine.training.together import end_at_once, part


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regraft",
        description="Graft a new task onto a pretrained encoder: train it, evaluate it, export it, serve it.",
    )
    parser.add_argument("--version", action="version", version=f"regraft {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_init(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_methods(commands)
    _add_features(commands)
    _add_compare(commands)
    _add_tokenizer(commands)
    for command in entry_points(group="regraft.commands"):
        command.load()(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 for an error that is the user's to solve, 3 where another process of the same run has
    one, 130 when interrupted."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "texts") and not any(text.startswith("-") for text in rest):
        args.texts, rest = [*args.texts, *rest], []  # argparse takes no more positional arguments after an option
    if len(rest) == 1 and args.command == "evaluate" and args.data is None and not rest[0].startswith("-"):
        args.data, rest = rest[0], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    give_way()
    try:
        code = args.handler(args) or 0
        sys.stdout.flush()  # a full disk behind it is told here, not after the end
        part()
        return code
    except KeyboardInterrupt:
        return _refused("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe has gone, as `| head` does
        leave_output()
        return 0
    except RegraftError as error:
        return _refused(str(error), 3 if isinstance(error, LostProcessError) else 2)
    except OSError as error:  # a disk, a folder, a right: nothing that a traceback would help with
        if error.strerror is None:
            raise
        if error.filename is None:
            leave_output()
        return _refused(f"{'standard output' if error.filename is None else error.filename}: {error.strerror}")


def leave_output() -> None:
    """Write to nowhere from here on: what is left in the buffer would fail again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refused(message: str, code: int = 2) -> int:
    print(f"regraft: {message}", file=sys.stderr)
    end_at_once(code)
    return code


def _add_init(commands: argparse._SubParsersAction) -> None:
    from regraft.engine.init_command import add_parser

    add_parser(commands)


def _add_methods(commands: argparse._SubParsersAction) -> None:
    from regraft.engine.methods.merge_command import add_parser as add_merge
    from regraft.engine.methods.plan_command import add_parser as add_plan

    add_merge(commands)
    add_plan(commands, _add_config_arguments)


def _add_features(commands: argparse._SubParsersAction) -> None:
    from regraft.engine.features.command import add_parser

    add_parser(commands)


def _add_compare(commands: argparse._SubParsersAction) -> None:
    from regraft.engine.compare.command import add_parser

    add_parser(commands)


def _add_tokenizer(commands: argparse._SubParsersAction) -> None:
    from regraft.engine.tokenizer_command import add_parser

    add_parser(commands)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the run's YAML file")
    _add_set(parser, "KEY=VALUE", "override a key, such as training.learning_rate=3e-5")


def _add_set(parser: argparse.ArgumentParser, shape: str, told: str) -> None:
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar=shape, help=told)


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="train as a YAML file says; started again, it goes on where it stopped")
    _add_config_arguments(parser)
    parser.add_argument("--restart", action="store_true", help="throw away what the run folder holds and train anew")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="share each step among N processes here")
    parser.set_defaults(handler=_train)


def _train(args: argparse.Namespace) -> int:
    from regraft.engine.config import load_config

    config = load_config(args.config, args.overrides)
    if args.processes != 1:
        from regraft.engine.training.launch import check_processes, launch

        check_processes(config, args.processes)
        flags = [f"--{name}" for name in ("restart", "quiet") if getattr(args, name)]
        return launch([args.config, *(x for o in args.overrides for x in ("--set", o)), *flags], args.processes)
    from regraft.engine.figures import figure
    from regraft.engine.training.run import train

    result = train(config, restart=args.restart, quiet=args.quiet)
    if int(os.environ.get("RANK", "0")):
        return 0
    for split, metrics in result.metrics.items():
        print(f"{split:5} " + "  ".join(f"{name} {figure(value)}" for name, value in metrics.items()))
    if result.earlier:
        print("finished before, with the same configuration and rows; --restart trains anew")
    print(
        f"{result.steps} steps in {result.seconds:.1f} s; best model: {result.folder / 'best'}; report: {result.folder / 'report.html'}"
    )
    return 0


def _add_data_overrides(parser: argparse.ArgumentParser) -> None:
    told = "read the rows otherwise than the run did: data.columns.text=body, data.empty=drop"
    _add_set(parser, "data.KEY=VALUE", told)


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", metavar="NAME", help="one of the tasks of a model that learned several")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evaluate", help="figures of a trained model on labelled rows")
    parser.add_argument("model", help="run folder or model folder")
    parser.add_argument("data", nargs="?", help="file with labelled rows; default: the run's test or dev file")
    _add_task(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    _add_data_overrides(parser)
    parser.set_defaults(handler=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from regraft.engine.predict import evaluate_file

    return evaluate_file(args.model, args.data, args.format, args.task, args.overrides)


def _add_predict(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "predict", help="answers for texts: on the command line, from a file or standard input"
    )
    parser.add_argument("model", help="run folder or model folder")
    parser.add_argument(
        "texts", nargs="*", help="texts; none: --file, or standard input, one text or JSON object a line"
    )
    parser.add_argument("--file", help="jsonl, csv, tsv or parquet with the columns the model was trained on")
    parser.add_argument("--pair", help="second text of a pair, for one text on the command line")
    _add_task(parser)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="answer with the run NAME in the folder MODEL; given again: with several, over one backbone (jsonl)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K most probable labels")
    parser.add_argument("--format", choices=("table", "jsonl", "csv"), help="default: table on a terminal, else jsonl")
    _add_data_overrides(parser)
    parser.set_defaults(handler=_predict)


def _predict(args: argparse.Namespace) -> int:
    from regraft.engine.predict import predict_command

    options = {"file": args.file, "pair": args.pair, "top_k": args.top_k, "style": args.format, "task": args.task}
    options |= {"overrides": args.overrides}
    return predict_command(args.model, args.texts, adapters=args.adapter, **options)


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="turn a trained model into a bundle that can be served")
    parser.add_argument(
        "model", nargs="+", help="run folder or model folder; several frozen models over one encoder make one bundle"
    )
    parser.add_argument("--to", required=True, metavar="BUNDLE", help="folder to write")
    parser.add_argument(
        "--adapters", action="store_true", help="several adapters over one backbone in one graph; requests name theirs"
    )
    parser.add_argument(
        "--layout", choices=("packed", "padded"), default="packed", help="padded: the usual graph, for other servers"
    )
    parser.add_argument("--int8", action="store_true", help="quantise the linear layers' weights to 8 bits")
    parser.add_argument(
        "--max-loss",
        type=float,
        default=0.5,
        metavar="POINTS",
        help="how much of the task's metric int8 may cost, in points of 100",
    )
    parser.add_argument("--data", metavar="FILE", help="labelled rows to compare on; default: the run's dev rows")
    _add_data_overrides(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.set_defaults(handler=_export)


def _export(args: argparse.Namespace) -> int:
    if args.adapters:
        from regraft.engine.methods.export_several import export_adapters, refuse_options

        refuse_options(args.layout, args.int8, args.data, args.overrides)
        print(export_adapters(args.model, args.to, force=args.force))
        return 0
    from regraft.engine.export import export_bundle

    report = export_bundle(
        args.model,
        args.to,
        layout=args.layout,
        int8=args.int8,
        max_loss=args.max_loss,
        data_file=args.data,
        overrides=args.overrides,
        force=args.force,
    )
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
