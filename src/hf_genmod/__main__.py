"""
Trains image generative models, draws with them, measures and shares them.

    hf_genmod train cfg --dataset path/to/class_folders --max_train_minutes 30 --output_dir runs/mine
    hf_genmod sample runs/mine --class_labels cat dog --num 16 --output grid.png

train TASK, with the task one of
{tasks}

with a trained model
    sample MODEL          draw images
    edit MODEL            vary or complete an image, or go from one to another
    enlarge IMAGE ...     enlarge images by upsamplers, or draw by a model and enlarge
    evaluate MODEL        measure how good its images are
    transfer MODEL        measure what the features of an autoencoder are worth
    demo MODEL            try it on a page in the browser
    push MODEL REPO_ID    upload it with its card to the Hub, and test that it loads

    doctor PATH           find problems of a data set, a run or a checkpoint, and what to do

`hf_genmod COMMAND --help` lists the flags of a command. Each command that trains or measures also takes
    --num_processes N         the number of processes, such as GPUs, that share the work
    --accelerate_config NAME  settings to start them by: {settings};
                              a file, or the name of one in Accelerate's folder
    --machine_rank N --main_process_ip ADDRESS
                              of several machines: which of them this is, from 0, and where the first one is
"""

import argparse
import atexit
import contextlib
import difflib
import importlib
import logging
import os
import runpy
import signal
import sys
from pathlib import Path

from hf_genmod import __version__
from hf_genmod.errors import LAUNCHED, OneLineParser, counted, first_line, one_line_errors, refuse_unknown
from hf_genmod.progress import count_seconds, waiting

TASKS = {
    "cfg": "a class-conditional model with classifier-free guidance",
    "unconditional": "a model of images without labels",
    "classifier": "a classifier that guides an unconditional model",
    "text-to-image": "a model of captioned images",
    "latent-cfg": "an autoencoder, and a class-conditional model of its latents",
    "autoencoder": "an autoencoder",
    "vae": "a variational autoencoder",
    "upsampler": "a model that enlarges images",
    "few-step": "a trained model that draws in one to four steps",
    "lora": "an adapter (LoRA): a new class or word from a few images",
}
SCRIPTS = {name: name for name in ("sample", "edit", "evaluate")}
SCRIPTS |= {"enlarge": "sample_cascade", "transfer": "transfer_features"}
# The flag of what comes first on the command line without a flag.
FIRST = {"sample": "--model", "edit": "--model", "enlarge": "--images", "evaluate": "--model", "transfer": "--vae"}
PACKAGE = Path(__file__).parent
EXAMPLES = PACKAGE / "examples"  # where the wheel puts them
if not EXAMPLES.is_dir():  # in a checkout
    EXAMPLES = PACKAGE.parents[1] / "examples"
OF_MACHINES = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")  # of Accelerate's launcher
HELP = ("-h", "--help", "help")
DATA_FLAGS = ("image_column", "label_column", "caption_column", "config_name", "array_axes")


def known(name: str, names, what: str) -> str:
    """A name, if it is one of `names`."""
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(names)}"
        raise ValueError(f"{name}: no such {what}; {hint}")
    return name


def run_script(command: str, script: str, flags: list[str]) -> None:
    """Runs an example script in this process or, with --num_processes or --accelerate_config, in several."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    for name in ("num_processes", *OF_MACHINES):
        parser.add_argument(f"--{name}", type=str if name == "main_process_ip" else int)
    launch, flags = parser.parse_known_args(flags)
    for name in OF_MACHINES if launch.accelerate_config is None else ():
        if getattr(launch, name) is not None:
            raise ValueError(f"{name}: it is for several machines; add --accelerate_config two_machines")
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # threads that wait leave their core to other programs soon
    os.environ["HF_GENMOD_COMMAND"] = f"hf_genmod {command}"  # for --help, and the records of a run
    again = ["--module", "hf_genmod", *command.split(), *flags]
    if launch.accelerate_config is not None:
        with waiting("loading PyTorch"):
            from accelerate.commands import launch as accelerate

        words = [*_settings_of(launch), *again]
        os.environ["HF_GENMOD_SETTINGS"] = launch.accelerate_config  # for the records of a run
        if os.name == "posix":
            accelerate.simple_launcher = _become
        with _launching():
            accelerate.launch_command(accelerate.launch_command_parser().parse_args(words))
    elif launch.num_processes is not None:
        with waiting("loading PyTorch"):
            from torch.distributed.run import get_args_parser, run

            from hf_genmod.processes import check_processes, threads_of

        check_processes(launch.num_processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_of(launch.num_processes)))
        with _launching():
            launcher = get_args_parser()
            launcher.allow_abbrev = False  # a flag of a script, such as --num, is not a part of its own
            run(launcher.parse_args(["--standalone", "--nproc_per_node", str(launch.num_processes), *again]))
    else:
        if os.environ.get("RANK", "0") == "0":  # of several processes the first
            with waiting("loading PyTorch"):
                importlib.import_module("hf_genmod.recipes.arguments")  # with most of what the scripts import
        file = str(EXAMPLES / f"{script}.py")
        sys.argv = [file, *flags]
        sys.path.insert(0, str(EXAMPLES))  # where Python looks first for what a script imports
        runpy.run_path(file, run_name="__main__")


def _settings_of(launch: argparse.Namespace) -> list[str]:
    """The flags of Accelerate's launcher for the settings that a person names. Raises a `ValueError` if it would wait
    for machines that do not come, or start what the training does not know."""
    import yaml
    from accelerate.commands.config.config_args import cache_dir, load_config_from_file

    name = launch.accelerate_config
    places = [Path(name), Path(cache_dir, f"{name}.yaml"), EXAMPLES / "accelerate" / f"{name}.yaml"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        missing = f"accelerate_config: there is no file {places[0]}, and no {places[1]}"
        ready = f"{', '.join(ready_settings())} come with this package"
        raise ValueError(f"{missing}; {ready}, and `accelerate config --config_file FILE` writes others")
    try:
        in_file = vars(load_config_from_file(str(file)))
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        remedy = "`accelerate config --config_file FILE` writes such a file"
        raise ValueError(f"accelerate_config: {file} holds no settings ({first_line(error)}); {remedy}") from error
    given = {name: value for name, value in vars(launch).items() if name != "accelerate_config" and value is not None}
    total, machines, rank, address = (
        given.get(name, in_file.get(name))
        for name in ("num_processes", "num_machines", "machine_rank", "main_process_ip")
    )
    if in_file["distributed_type"] in ("DEEPSPEED", "MEGATRON_LM"):
        kind = in_file["distributed_type"].value
        raise ValueError(f"accelerate_config: {name} is for {kind}, which cannot train here; fsdp is for large models")
    if (machines or 1) > 1:
        if address is None:
            raise ValueError(f"main_process_ip: {name} is for {machines} machines; give the address of the first one")
        if not 0 <= rank < machines:
            raise ValueError(f"machine_rank: {rank} is not within 0 ... {machines - 1}; give each machine its own")
        if total % machines:
            raise ValueError(f"num_processes: {total} cannot be shared evenly among {machines} machines")
    return ["--config_file", str(file), *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def ready_settings() -> list[str]:
    """The names of the settings for Accelerate that come with this package."""
    return sorted(path.stem for path in (EXAMPLES / "accelerate").glob("*.yaml"))


@contextlib.contextmanager
def _launching():
    """A context for a launcher, which ends with the error and the status of the first of its processes that failed."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # a file in this folder takes the place of no library
    logging.disable(logging.ERROR)
    try:
        yield
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            if Path(failure.error_file).is_file():
                print(f"error: {failure.message}", file=sys.stderr)
            sys.exit(failure.exitcode)
        ended_by = signal.Signals(-failure.exitcode)
        print(f"error: process {rank} was ended by {ended_by.name}", file=sys.stderr)
        sys.exit(128 + ended_by)


def _become(arguments):
    """Accelerate's launcher of one process, in the place of this one, which would not pass signals on."""
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(arguments)
    os.execvpe(command[0], command, environment)


def doctor(arguments) -> int:
    with waiting("loading PyTorch"):
        from hf_genmod.sharing.doctor import examine, is_checkpoint

    path = arguments.path
    if is_checkpoint(path):
        with waiting("reading the checkpoint, and drawing an image by the code in it"):
            contents, findings, commands = [], list(examine(path)), []
        status = 1 if findings else 0
    else:
        from hf_genmod.recipes.dataset_doctor import examine_dataset
        from hf_genmod.recipes.pictures import CaptionedDataArguments

        flags = {name: getattr(arguments, name) for name in ("split", *DATA_FLAGS)}
        contents, findings, commands, would_start = examine_dataset(CaptionedDataArguments(dataset=path, **flags))
        status = 0 if would_start else 1
    for line in [*contents, *(f"- {finding}" for finding in findings)]:
        print(line.replace("\n", "\\n"))  # of the name of a file
    for command in commands:
        print(f"to train on it: {command}")
    print(f"{path}: {counted(len(findings), 'finding') if findings else 'no findings'}")
    return status


def push(arguments) -> int:
    with waiting("loading PyTorch"):
        from hf_genmod.sharing.push import PushError, push_checkpoint
        from hf_genmod.sharing.space import check_space, push_space

    if arguments.space:
        check_space(arguments.path, arguments.create_pr)
    what = "writing the card, uploading, and drawing an image from here and from the Hub"
    with one_line_errors(PushError, status=1), waiting(what):
        report = push_checkpoint(
            arguments.path,
            arguments.repo_id,
            private=arguments.private or None,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            license=arguments.license,
        )
    print(f"{report.url} loads and draws what {arguments.path} does ({report.sample})")
    if arguments.space:
        with one_line_errors(PushError, status=1), waiting("uploading the page"):
            url = push_space(arguments.path, report.repo_id, report.revision, arguments.private or None)
        print(f"{url} shows a page for it" + ("; give the Space a secret HF_TOKEN" if arguments.private else ""))
    return 0


def demo(arguments) -> int:
    try:
        with waiting("loading PyTorch and Gradio"):
            from hf_genmod.demo.model import DemoModel
            from hf_genmod.demo.server import check_port, serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError('demo: the page needs Gradio; install it by `pip install "hf_genmod[demo]"`') from error
    check_port("127.0.0.1", arguments.port)
    with waiting("loading the model"):
        model = DemoModel(arguments.path, arguments.upsamplers, adapter=arguments.adapter)
    with waiting("starting the page"):
        page = serve(model, arguments.port, arguments.share)
    print(f"{page.share_url or page.local_url} shows {model.name}; Ctrl-C ends it", flush=True)
    page.block_thread()
    return 0


def parse_own(command: str, flags: list[str]) -> argparse.Namespace:
    """The arguments of a command that is no example script."""
    parser = OneLineParser(prog=f"hf_genmod {command}", allow_abbrev=False)
    if command == "doctor":
        parser.description = "Finds problems of a data set, a run or a checkpoint, and what to do."
        parser.set_defaults(function=doctor)
        parser.add_argument("path", help="Folder of images or parquet files, or the output_dir of a run.")
        parser.add_argument("--split", default="train", help="Split of the data set.")
        for name in DATA_FLAGS:
            parser.add_argument(f"--{name}", help="As the training scripts take it.")
    elif command == "demo":
        parser.description = "Shows a model on a page in the browser, on this machine alone unless --share."
        parser.set_defaults(function=demo)
        parser.add_argument("path", metavar="model", help="The output_dir of a run, or an id on the Hub.")
        parser.add_argument("--upsamplers", nargs="+", default=[], help="Models that enlarge its images, in order.")
        parser.add_argument("--adapter", help="An adapter for the model: the folder of its run, or its id.")
        parser.add_argument("--port", type=int, default=7860, help="The port at 127.0.0.1. Default: 7860.")
        parser.add_argument("--share", action="store_true", help="Make a link by Gradio that anybody can open.")
    else:
        parser.description = "Uploads a checkpoint with its card to the Hub, and tests that it loads."
        parser.set_defaults(function=push)
        parser.add_argument("path", help="The output_dir of a complete run.")
        parser.add_argument("repo_id", help="The repository. Without a slash it is one of your own.")
        parser.add_argument("--license", help="Licence of the model, such as mit. By default that of its card.")
        parser.add_argument("--private", action="store_true", help="Create the repository as a private one.")
        parser.add_argument("--revision", help="The branch, which is created if it does not exist.")
        parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead.")
        parser.add_argument("--space", action="store_true", help="Make a Space, too: a page to try the model.")
    arguments, unknown = parser.parse_known_args(flags)
    refuse_unknown(unknown, [*vars(arguments)])
    return arguments


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    tasks = "\n".join(f"    {task:<21} {text}" for task, text in TASKS.items())
    if not argv or argv[0] in HELP:
        print(__doc__.format(tasks=tasks, settings=", ".join(ready_settings())).strip())
        return 0
    if argv[0] == "--version":
        print(f"hf_genmod {__version__}")
        return 0
    with one_line_errors():
        command, *flags = argv
        known(command, ["train", *SCRIPTS, "demo", "doctor", "push", "--help", "--version"], "command")
        if command in ("demo", "doctor", "push"):
            arguments = parse_own(command, flags)
            if not arguments.path.strip():
                raise ValueError("path: it is empty; give the folder of a data set or of a run")
            return arguments.function(arguments)
        if command in SCRIPTS:
            if flags and not flags[0].startswith("-"):
                flags = [FIRST[command], *flags]
            run_script(command, SCRIPTS[command], flags)
            return 0
        if not flags or flags[0] in HELP:
            print(f"hf_genmod train TASK [--FLAG VALUE ...], with the task one of\n{tasks}")
            return 0
        if flags[0].startswith("-"):
            raise ValueError(f"{flags[0]}: the task comes before the flags; it is one of {', '.join(TASKS)}")
        task = known(flags[0].replace("_", "-"), TASKS, "task")
        script = "finetune_lora" if task == "lora" else f"train_{task}".replace("-", "_")
        run_script(f"train {task}", script, flags[1:])
    return 0


def command() -> None:
    """`main` as a process of its own, which does not spend seconds on clearing its memory at the end."""
    count_seconds()
    status = None

    def leave():
        if isinstance(status, int):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(leave)  # before all others, so that it runs after them
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code
    sys.exit(status)


if __name__ == "__main__":
    command()
