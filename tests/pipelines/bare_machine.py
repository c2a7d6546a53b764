"""A machine with torch and diffusers, on which other packages are not installed.

    with BareMachine(hub.environment(home), absent=["transformers"]) as machine:
        machine.draw("user/checkpoint")

Run as a script, this file is that machine: it calls the functions below as its standard input asks, line by line.
"""

import json
import math
import subprocess
import sys
import tempfile
import traceback

FIRST_LINE = "\x1e"  # begins each answer, so that whatever else is printed does no harm


class BareMachine:
    def __init__(self, environment, absent):
        self.log = tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, *absent]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environment)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def __getattr__(self, function):
        def call(*arguments, **options):
            self.process.stdin.write(json.dumps([function, arguments, options], default=str) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith(FIRST_LINE):
                    answer, error = json.loads(line[1:])
                    if error:
                        raise RuntimeError(error)
                    return Pictures(answer) if isinstance(answer, list) else answer
            self.log.seek(0)
            raise RuntimeError(f"the machine stopped: {self.log.read()[-2000:]}")

        return call


class Pictures(list):
    """The numbers of some images. They are equal if they differ by rounding alone: how a processor rounds depends on
    where a file was mapped to in memory, and on the number of threads."""

    def __eq__(self, other):
        return len(self) == len(other) and all(
            math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4) for a, b in zip(self, other, strict=True)
        )

    def __ne__(self, other):
        return not self == other


def fingerprint(pipeline):
    """The images that a few seeds give: their latents before any decoder, and their pixels; of an autoencoder those of
    reconstructions and samples."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for output_type in ("latent", "np"):
        generator = torch.Generator().manual_seed(0)
        if hasattr(pipeline, "reconstruct"):
            x = torch.rand(2, *pipeline.picture_shape, generator=generator)
            pictures.append(pipeline.reconstruct(x, output_type).images)
            prior = "standard" if pipeline.vae.has_standard_prior else "fitted"
            pictures.append(pipeline(2, prior, generator=generator, output_type=output_type).images)
        else:
            request = [0, 2] if "id2label" in pipeline.config else 2
            if "factor" in pipeline.config:
                request = torch.rand(2, pipeline.picture_shape[0], 4, 6, generator=generator)
            request = ["a red cat", "two dogs on a hill"] if hasattr(pipeline, "tokenizer") else request
            options = {"num_inference_steps": 2, "generator": generator, "output_type": output_type}
            pictures.append(pipeline(request, **options).images)
    return Pictures(number for images in pictures for number in torch.as_tensor(images).flatten().tolist())


def load(checkpoint, **options):
    """Anyone's way to open a checkpoint: the classes come out of it."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(checkpoint, trust_remote_code=True, **options)


def draw(checkpoint, **options):
    return fingerprint(load(checkpoint, **options))


def draw_with_the_package(checkpoint):
    from hf_genmod import ClassifierFreeGuidedPipeline

    return fingerprint(ClassifierFreeGuidedPipeline.from_pretrained(checkpoint))


def error_of_editing(checkpoint):
    """What a checkpoint says that is given an image to edit."""
    pipeline = load(checkpoint)
    try:
        pipeline(0, image=[[]], num_inference_steps=2)
    except ImportError as error:
        return str(error)


def save_again(checkpoint, folder, **options):
    load(checkpoint).save_pretrained(folder, **options)


def push_again(checkpoint, repo_id):
    load(checkpoint).push_to_hub(repo_id)


def load_both_then_save_the_first(first, second, folder):
    pipeline = load(first)
    load(second)
    pipeline.save_pretrained(folder)


def imports(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    sys.modules |= dict.fromkeys(sys.argv[1:])  # None: neither found nor importable
    for line in sys.stdin:
        function, arguments, options = json.loads(line)
        try:
            answer = [globals()[function](*arguments, **options), None]
        except Exception:
            answer = [None, traceback.format_exc()]
        print(FIRST_LINE + json.dumps(answer), flush=True)
