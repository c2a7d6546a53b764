"""What README and docs name exists: folders, files, modules, names and flags. Their Python runs."""

import ast
import re
from pathlib import Path

import pytest
import torch
from adapter_cases import trained
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from small_pipelines import classifier_guided, guided, of_images, of_text, unconditional, upsampler
from tiny import tiny_autoencoder, tiny_classifier, tiny_unet

import hf_genmod
from hf_genmod import AncestralDDPMScheduler
from hf_genmod.__main__ import OF_MACHINES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_genmod"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
]

# Of argparse, torchrun, accelerate, SLURM and Jupyter.
FOREIGN_FLAGS = {"help", "num_processes", "nproc_per_node", "num_cpu_threads_per_process"}
FOREIGN_FLAGS |= {"signal", "ntasks", "gpus", "config_file", "inplace", *OF_MACHINES}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.MULTILINE | re.DOTALL)


def tree(page: str, title: str) -> dict[str, str]:
    """The lines of the tree below a heading of a page: what is said of each file or folder."""
    section = text_of(ROOT / page).split(f"## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^      (\S+) +(\S.*)$", section, flags=re.MULTILINE))


def test_the_architecture_names_every_folder_and_no_other():
    folders = {f"{file.parent.name}/" for file in PACKAGE.glob("*/__init__.py")}
    assert set(tree("CONTRIBUTING.md", "The architecture")) == folders


def test_each_folder_imports_only_from_those_above_it_in_the_architecture():
    order = [folder.rstrip("/") for folder in tree("CONTRIBUTING.md", "The architecture")]
    for position, folder in enumerate(order):
        for file in (PACKAGE / folder).glob("*.py"):
            imported = re.findall(r"^\s*from (?:hf_genmod\.|\.\.)(\w+)[. ]", text_of(file), flags=re.MULTILINE)
            below = set(imported) & set(order[position + 1 :])
            assert not below, f"{file.name} of {folder} imports from {below}"


def test_the_files_of_equations_exist():
    files = tree("docs/equations.md", "The most important files")
    assert len(files) == 6
    for file in files:
        assert (PACKAGE / file).is_file(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    text = text_of(page)
    for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for path in re.findall(r"(?<![\w/.])(?:examples|benchmarks|docs|src|tests|model_cards)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for anchor in re.findall(r"benchmarks/README\.md#([\w-]+)", text):
        headings = re.findall(r"^#+ (.*)$", text_of(ROOT / "benchmarks/README.md"), flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_the_code_of_a_page_imports_exists(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] != "hf_genmod":
                continue
            defined = set(hf_genmod.__all__)
            if node.module != "hf_genmod":
                file = PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
                statements = ast.parse(text_of(file)).body
                defined = {statement.name for statement in statements if hasattr(statement, "name")}
            for alias in node.names:
                assert alias.name in defined, f"{node.module} has no {alias.name}"


def test_flags_that_a_page_names_exist():
    flags = set(FOREIGN_FLAGS)
    for file in [*PACKAGE.rglob("*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                flags.add(node.target.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
                flags.add(node.value[2:])
    for page in PAGES:
        own = {name for block in python_blocks(page) for name in re.findall(r"^    (\w+): ", block, re.MULTILINE)}
        named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", text_of(page)))
        assert not named - flags - own, f"{page.name}: {named - flags - own}"


def test_every_public_name_has_its_place_in_the_api():
    named = [
        line for page in (ROOT / "docs/api").glob("*.md") for line in re.findall(r"^::: (.*)$", text_of(page), re.M)
    ]
    assert len(named) == len(set(named))
    assert {f"hf_genmod.{module}.{name}" for name, module in hf_genmod._MODULES.items()} <= set(named)


def animals(unet=None, **kwargs):
    return guided(unet or tiny_unet(num_classes=2), sampler(), id2label={0: "cat", 1: "dog"}, **kwargs)


def sampler():
    scheduler = AncestralDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    options = {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"}
    return DPMSolverMultistepScheduler.from_config(scheduler.config, **options)


KELVIN = {"low": [200.0] * 3, "high": [300.0] * 3}
# The checkpoints that pages draw with; their models are tiny and random.
CHECKPOINTS = {
    "mine": animals,
    "small": animals,
    "mine-fast": animals,
    "shapes": lambda: guided(tiny_unet(num_classes=2), sampler(), id2label={0: "circle", 1: "star"}),
    "plain": lambda: unconditional(scheduler=sampler()),
    "fields": lambda: guided(scheduler=sampler(), id2label={0: "ring", 1: "b", 2: "c"}, value_range=KELVIN),
    "guided": lambda: classifier_guided(classifier=tiny_classifier(num_classes=2), id2label={0: "cat", 1: "dog"}),
    "text": lambda: of_text(scheduler=sampler()),
    "vae": lambda: of_images(tiny_autoencoder(vector_latents=True, latent_channels=8)),
    "upsampler": lambda: upsampler(tiny_unet(conditioning_channels=3), sampler(), None),
    "upsampler-2x": lambda: upsampler(tiny_unet(sample_size=16, conditioning_channels=3), sampler(), None),
}
FAST = ("README.md", "samplers.md")
WITH_PYTHON = [
    pytest.param(page, marks=[] if page.name in FAST else pytest.mark.slow, id=page.relative_to(ROOT).as_posix())
    for page in PAGES
    if python_blocks(page)
]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(python_blocks(page))
    for name in set(re.findall(r'"runs/([\w-]+)"', code)):
        if name in CHECKPOINTS:
            CHECKPOINTS[name]().save_pretrained(f"runs/{name}")
        elif name in ("zebra", "okapi"):  # adapters, each with a class of this name
            trained(animals(), name=name).save_lora_weights(f"runs/{name}")
    for file in ("a.png", "b.png", "mine.jpg"):
        Image.new("RGB", (12, 8), "teal").save(file)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    code = code.replace('"cuda"', repr(str(accelerator)))
    code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=4", code)
    code = code.replace("max_train_steps=1000", "max_train_steps=2, sampling_steps=0")
    exec(compile(code, page, "exec"), {"__name__": "page"})
