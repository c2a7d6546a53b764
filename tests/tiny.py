"""Models small enough for tests, in which no layer is left at zero."""

from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import CLIPTextConfig, CLIPTextModel, T5Config

from hf_genmod.models.denoising_unet import DenoisingUNet2DModel
from hf_genmod.models.image_autoencoder import Autoencoder
from hf_genmod.models.noisy_classifier import NoisyImageClassifier
from hf_genmod.models.variational_autoencoder import VariationalAutoencoder
from hf_genmod.pipelines.text_to_image import TextToImagePipeline
from hf_genmod.schedulers.ancestral_ddpm import AncestralDDPMScheduler
from hf_genmod.training.text_encoder import train_tokenizer

TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}

TINY_AUTOENCODER = {
    "sample_size": 8,
    "latent_channels": 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}


# A U-Net for each kind of condition.
UNET_KINDS = {
    "unconditional": {},
    "labels": {"num_classes": 3},
    "text": {"cross_attention_dim": 12},
    "image": {"conditioning_channels": 2},
    "everything": {
        "sample_size": (16, 8),
        "in_channels": 4,
        "out_channels": 8,
        "attention_levels": (True, True),
        "layers_per_block": 2,
        "num_classes": 3,
        "cross_attention_dim": 12,
        "conditioning_channels": 1,
        "patch_size": 2,
        "fourier_frequencies": (1.0, 3.0),
    },
}


# An autoencoder of each kind.
AUTOENCODER_KINDS = {
    "small": (Autoencoder, {}),
    "vector": (Autoencoder, {"vector_latents": True, "patch_size": 2, "in_channels": 1}),
    "variational": (VariationalAutoencoder, {"layers_per_block": 2, "likelihood": "discretised_gaussian"}),
    "variational vector": (
        VariationalAutoencoder,
        {
            "sample_size": (12, 8),
            "in_channels": 4,
            "block_out_channels": (8, 16, 16),
            "vector_latents": True,
            "likelihood": "bernoulli",
        },
    ),
}


def randomized(module, seed=0):
    """Many layers start at zero, where a test proves nothing: every parameter gets noise."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return module


def tiny_unet(**config):
    """A random U-Net, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomized(DenoisingUNet2DModel(**(TINY_UNET | config))).eval()


def tiny_classifier(**config):
    """A random classifier of three classes under the default noise, the same at each call."""
    schedule = {"noise_schedule": dict(AncestralDDPMScheduler().config)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = NoisyImageClassifier(**(TINY_UNET | {"num_classes": 3} | schedule | config))
        return randomized(classifier).eval()


def tiny_vae(**config):
    """A random autoencoder that halves height and width, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=(8, 16),
            norm_num_groups=8,
            **config,
        )
        return randomized(vae).eval()


def tiny_autoencoder(kind=VariationalAutoencoder, **config):
    """A random autoencoder of ours, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomized(kind(**(TINY_AUTOENCODER | config))).eval()


def unet_inputs(unet, n=2, seed=1):
    rng, config = torch.Generator().manual_seed(seed), unet.config
    size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
    inputs = {
        "sample": torch.randn(n, config.in_channels, *size, generator=rng),
        "timestep": torch.randint(1000, (n,), generator=rng),
    }
    if config.num_classes is not None:
        inputs["class_labels"] = torch.randint(config.num_classes + 1, (n,), generator=rng)
    if config.cross_attention_dim is not None:
        inputs["encoder_hidden_states"] = torch.randn(n, 5, config.cross_attention_dim, generator=rng)
        inputs["encoder_attention_mask"] = torch.arange(5) < torch.randint(1, 6, (n, 1), generator=rng)
    if config.conditioning_channels:
        inputs["conditioning_image"] = torch.randn(n, config.conditioning_channels, *size, generator=rng)
        inputs["conditioning_timestep"] = torch.randint(1000, (n,), generator=rng)
    return inputs


@torch.no_grad()
def predict(unet, inputs, **changed):
    return unet(**(inputs | changed)).sample


def same_weights(config, unet):
    """A model of another config with the weights of `unet`."""
    other = DenoisingUNet2DModel(**config).eval()
    other.load_state_dict(unet.state_dict())
    return other


def relative_error(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def autoencoder_inputs(model, n=2, seed=1):
    size = model.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(n, model.config.in_channels, *size, generator=torch.Generator().manual_seed(seed)).tanh()


def encoded(model, x):
    """All that the encoder says of x."""
    output = model.encode(x)
    return output.latents if "latents" in output else output.latent_dist.parameters


@torch.no_grad()
def everything(model, x):
    """Whatever the model makes of x, as one tensor for each picture."""
    moments = encoded(model, x)
    z = moments[:, : model.config.latent_channels]
    return torch.cat([part.flatten(1) for part in (moments, model.decode(z).sample, model(x).sample)], dim=1)


def assert_rounded_alike(actual, expected):
    """Two computations of the same numbers may round differently: by some hundred roundings of the largest number."""
    assert expected.dtype in (torch.float32, torch.float64), "in half precision any two numbers would be alike"
    tolerance = 1000 * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


CAPTIONS = ["a red cat", "a green dog on a hill", "two lizards", "a cat above a blue dog and a lizard"]


def tiny_tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=320)


def tiny_text_encoder(kind=CLIPTextModel, seed=0):
    """A random text encoder of transformers for `tiny_tokenizer`, the same at each call."""
    tokenizer, width = tiny_tokenizer(), {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind is CLIPTextModel:
            sizes = width | {"num_attention_heads": 2, "max_position_embeddings": 16}
            config = CLIPTextConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, **sizes, **special)
        else:
            sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
            config = T5Config(vocab_size=len(tokenizer), **sizes, **special)
        return randomized(kind(config), seed).eval()


def tiny_text_pipeline(kind=CLIPTextModel, scheduler=None, vae=None, **config):
    unet = tiny_unet(cross_attention_dim=16, **config)
    scheduler = scheduler or AncestralDDPMScheduler(clip_sample=vae is None)
    return TextToImagePipeline(unet, tiny_text_encoder(kind), tiny_tokenizer(), scheduler, vae)


class LinearVAE:
    """
    z ~ N(0, I) and x | z ~ N(W z + b, s²), for which log p(x) and p(z | x) are known: W has orthogonal columns, so
    that p(z | x) has independent dimensions. q(z | x) is p(z | x), moved by `offset` and `widening` times as wide.
    """

    def __init__(self, channels=4, latent_channels=2, s=0.5, offset=0.0, widening=1.0):
        rng = torch.Generator().manual_seed(0)
        columns = torch.randn(channels, latent_channels, generator=rng, dtype=torch.float64)
        self.W = torch.linalg.qr(columns).Q * torch.tensor([1.5, 0.7])
        self.b = torch.randn(channels, generator=rng, dtype=torch.float64)
        self.s, self.offset, self.widening = s, offset, widening
        self.config = SimpleNamespace(likelihood="gaussian")

    def latent_shape(self, height, width):
        return (self.W.shape[1], height, width)

    def encode(self, x):
        precision = 1 + (self.W**2).sum(dim=0) / self.s**2  # of p(z | x)
        mean = (x.flatten(1) - self.b) @ self.W / self.s**2 / precision + self.offset
        log_variance = torch.log(self.widening**2 / precision).expand_as(mean)
        parameters = torch.cat([mean, log_variance], dim=1)[:, :, None, None]
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(parameters))

    def decode(self, z):
        mean = (z.flatten(1) @ self.W.T + self.b)[:, :, None, None]
        return SimpleNamespace(sample=mean, log_variance=torch.tensor(self.s).double().log() * 2, logits=None)

    def __call__(self, x, epsilon):
        posterior = self.encode(x).latent_dist
        output = self.decode(posterior.mean + posterior.std * epsilon)
        return SimpleNamespace(**vars(output), latent_dist=posterior)

    def log_p(self, x):
        """log N(x; b, W Wᵀ + s² I), (n,)."""
        covariance = self.W @ self.W.T + self.s**2 * torch.eye(len(self.b))
        return torch.distributions.MultivariateNormal(self.b, covariance).log_prob(x.flatten(1))

    def gap(self, x):
        """KL(q(z | x) ‖ p(z | x)), by which the bound misses log p(x), (n,)."""
        q, p = self.encode(x).latent_dist, LinearVAE(s=self.s).encode(x).latent_dist
        normals = (torch.distributions.Normal(d.mean, d.std) for d in (q, p))
        return torch.distributions.kl_divergence(*normals).flatten(1).sum(dim=1)


def bars(n, seed=0, channels=3, size=16):
    """Pictures in noise with a bright bar: upright for class 0, level for class 1."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (n, channels, size, size), generator=rng, dtype=torch.uint8)
    labels = torch.randint(0, 2, (n,), generator=rng)
    for image, label, start in zip(images, labels, torch.randint(2, size - 4, (n,), generator=rng), strict=True):
        image.narrow(2 if label == 0 else 1, int(start), 2).fill_(230)
    return images, labels


def randn(*shape, seed=0):
    """Normal numbers in fp64, the same at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
